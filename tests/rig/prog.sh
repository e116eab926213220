#!/bin/sh
# A mail server for what no real one does on demand:
#   authenticating  takes any AUTH and says in its reply to MAIL whether it has
#   chatty          goes on talking unasked after EHLO, for a second
#   noting FILE     writes down what it hears, each line before it answers it
#   hashing N       tells the sha256 of the N octets that follow MAIL
#   sending N       sends N octets behind its reply to MAIL, always the same, and goes; `made N` is no server, and tells their sha256
#   stopped         stops itself before its greeting and is the server that the rest of the arguments name once it is continued
#   stopped-behind-greeting   the same after its greeting; then it knows QUIT and nothing else
#   stopped-at-reset          stops itself when it is told RSET
#   staying         ends its output behind its reply to QUIT, and stays a minute
#   lingering       is the server that the rest of the arguments name, and stays a while when that has ended
#   fresh MODE                MODE where it is told of a client's TLS, else it knows these few commands
mode=$1
shift
if [ "$mode" = fresh ]; then
  [ -z "${SSL_PROTOCOL-}" ] || mode=$1
  shift
fi
say() { printf '%s\r\n' "$*"; }
octets() { openssl enc -aes-128-ctr -K 00 -iv 00 -in /dev/zero 2>/dev/null | head -c "$1"; }
[ "$mode" != made ] || { octets "$1" | openssl dgst -sha256 -r; exit; }
case $mode in
lingering) "$@"; exec sleep 0.2 ;;
stopped)
  case ${TCPREMOTEIP-} in 192.0.2.25 | 198.51.100.25) ;; *) kill -STOP $$ ;; esac # not of a probe
  exec "$@"
  ;;
stopped-behind-greeting) say 220 rig; kill -STOP $$ ;;
*) say 220 rig ;;
esac
who=stranger
while read -r verb rest; do
  [ "$mode" != noting ] || printf '%s\n' "$verb${rest:+ $rest}" >>"$1"
  # In any case, with its CR. Without a process of its own, which a killed server would leave to whoever reaps orphans.
  case $verb in
  [Ee][Hh][Ll][Oo]*)
    say 250-rig
    say 250-PIPELINING
    say 250 AUTH PLAIN
    [ "$mode" != chatty ] || { for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; say 250 injected; done & } ;;
  [Hh][Ee][Ll][Oo]* | [Nn][Oo][Oo][Pp]* | [Rr][Ss][Ee][Tt]*)
    case $mode/$verb in stopped-at-reset/[Rr]*) kill -STOP $$ ;; esac
    say 250 ok ;;
  [Aa][Uu][Tt][Hh]*) who=authenticated; say 235 ok ;;
  [Mm][Aa][Ii][Ll]*)
    say 250 "$who"
    [ "$mode" != sending ] || { octets "$1"; exit; }
    [ "$mode" != hashing ] || { say 250 "$(head -c "$1" | openssl dgst -sha256 -r)"; exit; } ;;
  [Qq][Uu][Ii][Tt]*)
    say 221 bye
    [ "$mode" != staying ] || exec sleep 60 >&-
    exit ;;
  *) say 502 no ;;
  esac
done
