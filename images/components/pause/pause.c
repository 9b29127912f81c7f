/*
 * pause holds the namespaces of a pod. Where the pod shares its process
 * namespace, it is process 1 and reaps what the containers leave behind.
 */
#include <signal.h>
#include <stddef.h>
#include <sys/wait.h>

int main(void)
{
	sigset_t signals;
	int s;

	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGCHLD);
	/* Blocked and waited for: process 1 has no default actions, and nothing that
	 * arrives between two waits is lost. */
	if (sigprocmask(SIG_BLOCK, &signals, NULL) < 0)
		return 1;
	for (;;) {
		if (sigwait(&signals, &s) != 0)
			return 1;
		if (s != SIGCHLD)
			return 0;
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}
