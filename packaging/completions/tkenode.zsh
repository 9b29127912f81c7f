#compdef tkenode
# Made by go generate from the table of commands; do not edit.

if (( CURRENT == 2 )); then
	local -a words=(
		'status:how the node stands, and what to look at first'
		'plan:what the agent would change now'
		'boot:what took how long in this boot'
		'wake:have one instance, or all of them, look again now'
		'eni:the ENIs, their addresses, and what the pool waits for'
		'pods:the pods that have a VPC address, and how they are wired'
		'explain:pod, ip, disk'
		'disks:the disks of the NodeConfig, how each stands, and the others that are attached'
		'disk:adopt, format'
		'config:show, check'
		'agent:keep this CVM a working node; systemd runs it'
		'bootstrap:join the cluster that the user-data names; systemd runs it at every boot'
		'version:the version of this program'
		'help:what there is, or what a command does'
	)
	_describe command words
	return
fi
if [[ $words[CURRENT-1] == -o ]]; then
	compadd text json
	return
fi
case "$words[2] $words[3]" in
"status "*) compadd -- -o --watch ;;
"plan "*) compadd -- -o ;;
"boot "*) compadd -- -o ;;
"eni "*) compadd -- -o ;;
"pods "*) compadd -- -o ;;
"explain pod") compadd -- -o --to ;;
"explain ip") compadd -- -o --to ;;
"disks "*) compadd -- -o ;;
"explain disk") compadd -- -o ;;
"disk adopt") compadd -- --i-have-checked ;;
"disk format") compadd -- --i-have-checked ;;
"config check") compadd -- -o ;;
"bootstrap "*) compadd -- --user-data ;;
"explain "*) (( CURRENT == 3 )) && compadd pod ip disk || _files ;;
"disk "*) (( CURRENT == 3 )) && compadd adopt format || _files ;;
"config "*) (( CURRENT == 3 )) && compadd show check || _files ;;
"help "*) compadd status plan boot wake eni pods explain disks disk config agent bootstrap version help ;;
*) _files ;;
esac
