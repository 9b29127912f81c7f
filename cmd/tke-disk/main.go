// Command tke-disk looks at one disk for the agent, or unmounts what is left of it, and
// says what it finds. It is a process of its own because what hangs in the kernel can
// neither be killed nor restarted. It is not for people: tkenode disks is.
package main

import (
	"fmt"
	"os"

	"github.com/tkenode/tkenode/agent/disk"
)

func main() {
	if err := disk.Help(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "tke-disk: %v\n", err)
		os.Exit(1)
	}
}
