# Made by go generate from the table of commands; do not edit.
_tkenode() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
	if [ "$prev" = -o ]; then
		words="text json"
	elif [ "$COMP_CWORD" = 1 ]; then
		words="status plan boot wake eni pods explain disks disk config agent bootstrap version help"
	else
		case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
		"status "*) words="-o --watch" ;;
		"plan "*) words="-o" ;;
		"boot "*) words="-o" ;;
		"eni "*) words="-o" ;;
		"pods "*) words="-o" ;;
		"explain pod") words="-o --to" ;;
		"explain ip") words="-o --to" ;;
		"disks "*) words="-o" ;;
		"explain disk") words="-o" ;;
		"disk adopt") words="--i-have-checked" ;;
		"disk format") words="--i-have-checked" ;;
		"config check") words="-o" ;;
		"bootstrap "*) words="--user-data" ;;
		"explain "*) [ "$COMP_CWORD" = 2 ] && words="pod ip disk" ;;
		"disk "*) [ "$COMP_CWORD" = 2 ] && words="adopt format" ;;
		"config "*) [ "$COMP_CWORD" = 2 ] && words="show check" ;;
		"help "*) words="status plan boot wake eni pods explain disks disk config agent bootstrap version help" ;;
		esac
	fi
	if [ -n "$words" ]; then
		mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
	else
		mapfile -t COMPREPLY < <(compgen -f -- "$cur")
	fi
}
complete -F _tkenode tkenode
