#!/bin/sh
# Puts llmq on this box for the user who runs it: llmq.py, the command `llmq`, and a service that
# starts at login (a systemd user unit, on macOS a launch agent). It needs neither root nor network:
# it copies what lies beside it. Run again, it changes only what has changed. See --help.
set -eu
umask 022

usage() {
    cat <<'END'
usage: sh install.sh [option ...]
  --prefix DIR            where to: DIR/lib/llmq and DIR/bin (default: ~/.local)
  --socket-activated      systemd holds the port, so that a restart loses no request
  --sandbox auto|yes|no   keep the service out of your files; auto tries whether this box can
  --tray                  also the tray icon: the command `llmq-tray` and a menu entry
  --no-start              write the files, touch no service
  --dry-run               say what would be done, do nothing
  --uninstall [--purge]   remove all of it but the configuration [the configuration, too]
PYTHON names the interpreter (default: python3, else the newest python3.X). With DESTDIR all goes
below that folder and no service is touched. What is installed is kept up to date unasked.
END
}

die() { printf 'install.sh: %s\n' "$2" >&2 && exit "$1"; } # die CODE MESSAGE

# ---- Files ---------------------------------------------------------------------------------------
told() { # told WHAT FILE: the one line about it; what was not so before is noted in `changed`
    printf '%-13s %s\n' "$1" "$DESTDIR$2"
    [ "$1" = unchanged ] || changed="$changed ${2##*/} "
}

put() { # put MODE FILE COMMAND ...: FILE becomes what the command writes, whole or not at all
    mode=$1 file=$2 target=$DESTDIR$2
    [ ! -d "$target" ] || die 1 "$target is a folder"
    shift 2 && "$@" >"$scratch/new"
    if cmp -s "$scratch/new" "$target" && { [ "$mode" != 755 ] || [ -x "$target" ]; }; then
        told unchanged "$file" && return 0
    fi
    [ -z "$dry" ] || { told "would write" "$file" && return 0; }
    { mkdir -p "${target%/*}" && part=$(mktemp "${target%/*}/.llmq.XXXXXX") &&
        cat "$scratch/new" >"$part" && chmod "$mode" "$part" && mv -f "$part" "$target"; } \
        2>"$scratch/error" || die 1 "cannot write $target: $(sed -n 's/.*: //;$p' "$scratch/error")"
    told wrote "$file"
}

drop() { # drop FILE ...: away with them, and with the folders that this leaves empty
    for file; do
        target=$DESTDIR$file
        [ -e "$target" ] || [ -L "$target" ] || continue
        [ -z "$dry" ] || { told "would remove" "$file" && continue; }
        rm -rf "$target" 2>/dev/null || die 1 "cannot remove $target"
        told removed "$file"
        while target=${target%/*}; do
            case $target in "${DESTDIR:-$HOME}"/* | "$prefix" | "$prefix"/*) ;; *) break ;; esac
            rmdir "$target" 2>/dev/null || break
        done
    done
}

quotable() { # quotable PATH ...: ends where a launcher or a unit could not quote one of them
    for path; do
        case $path in *[\"\`\$\\]* | *"
"*) die 2 "no file that is written here could quote the path $path" ;; esac
    done
}

# ---- What this box has ---------------------------------------------------------------------------
find_python() { # sets `python`, a real path: where links and shims lead may change under a service
    look='import os, sys
print(os.path.realpath(sys.executable), sys.executable, sys.version.split()[0], sep="\n")
sys.exit(sys.version_info < (3, 9))'
    set -- python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9
    [ -z "${PYTHON-}" ] || set -- "$PYTHON"
    for name; do
        if found=$("$name" -c "$look" 2>/dev/null); then
            python=$(printf '%s\n' "$found" | sed -n 1p)
            tray_python=$(printf '%s\n' "$found" | sed -n 2p) # as called: a venv has the packages
            return 0
        fi
        [ -z "$found" ] || old="${old-}; $name is $(printf '%s\n' "$found" | sed -n 3p)"
    done
    die 1 "llmq needs Python 3.9 or newer, PYTHON=/path/to/python3 names one; tried $*${old-}"
}

read_settings() { # sets `host` and `port` as the configuration file has them
    settings=$(env -i HOME="${DESTDIR:-$HOME}" "$python" "$here/llmq.py" config show --json |
        "$python" -I -c 'import json, sys
server = json.loads(sys.stdin.read() or sys.exit(1))["server"]
print(server["port"], server["host"].replace("localhost", "127.0.0.1"))') ||
        die 1 "nothing was changed: mend the configuration first"
    port=${settings%% *} host=${settings#* }
}

has_user_manager() { # and may use it
    [ -z "$DESTDIR$dry" ] && [ "$start" ] && systemctl --user show-environment >/dev/null 2>&1
}

try_sandbox() { # turns `sandbox` from auto to yes or no; where it cannot be tried, as it was
    [ "$sandbox" = auto ] || return 0
    [ -e "$DESTDIR$drop_in" ] && sandbox=yes || sandbox=no
    has_user_manager || return 0
    sandbox=no
    ! systemd-run --user --quiet --wait --collect -p PrivateUsers=yes -p ProtectSystem=strict \
        -p PrivateTmp=yes true >/dev/null 2>&1 || sandbox=yes
}

# ---- What is written -----------------------------------------------------------------------------
launcher() { printf '#!/bin/sh\nexec' && printf ' "%s"' "$@" && printf ' "$@"\n'; }
percent() { printf '%s' "$1" | sed 's/%/%%/g'; } # as unit files and desktop entries want it
on() { printf '%s=yes\n' "$@"; }
bytecode() { # bytecode SOURCE FILE: right as long as FILE has these bytes, whatever its date
    env -i PYTHONHASHSEED=0 "$python" -sS -c 'import sys; del sys.path[0]; import py_compile as p
p.compile(*sys.argv[1:], doraise=True, invalidation_mode=p.PycInvalidationMode.CHECKED_HASH)' \
        "$1" "$scratch/pyc" "$2" && cat "$scratch/pyc"
}

service_unit() {
    cat <<END
[Unit]
Description=llmq, one queue in front of the local LLM runners
StartLimitIntervalSec=60
StartLimitBurst=5
${socket:+Requires=llmq.socket
After=llmq.socket
}
[Service]
Type=notify
NotifyAccess=main
ExecStart="$(percent "$python")" -I -u "$(percent "$library")" serve
ExecReload=/bin/sh -c "kill -HUP \${MAINPID}"
EnvironmentFile=-%h/.config/llmq/llmq.env
Restart=on-failure
RestartSec=2
# 2 is a mistake in the configuration, 78 a port that is taken: trying again would not help.
RestartPreventExitStatus=2 78
WatchdogSec=30
# Above drain_timeout (30 s); llmq asks for more while a longer drain goes on.
TimeoutStopSec=45
UMask=0077
LimitNOFILE=65536
# What needs no user namespaces; the rest is in llmq.service.d/10-sandbox.conf.
$(on NoNewPrivileges LockPersonality MemoryDenyWriteExecute RestrictNamespaces RestrictRealtime \
        RestrictSUIDSGID)
# AF_NETLINK: which user of this box asks.
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=default.target
END
}

sandbox_unit() {
    printf '# Needs user namespaces. Without PrivateUsers=yes systemd before 253 ignores most of it'
    printf ' and says nothing.\n[Service]\nProtectSystem=strict\nProtectProc=invisible\n'
    on PrivateUsers PrivateTmp PrivateDevices ProtectClock ProtectControlGroups ProtectHostname \
        ProtectKernelLogs ProtectKernelModules ProtectKernelTunables
    printf 'ReadWritePaths=-%%h/.config/llmq -%%h/.local/state/llmq\n'
    printf 'InaccessiblePaths=-%%h/.ssh -%%h/.gnupg\nCapabilityBoundingSet=\n'
}

socket_unit() {
    printf '[Unit]\nDescription=The port of llmq, held open while it restarts\n\n[Socket]\n'
    [ "$host" ] || ! grep -qs '^0\{31\}1 ' /proc/net/if_inet6 || set -- ::1 # this box has it
    for address in "${host:-127.0.0.1}" "$@"; do
        case $address in *:*) address="[$address]" ;; esac
        printf 'ListenStream=%s:%s\n' "$address" "$port"
    done
    printf 'BindIPv6Only=ipv6-only\nNoDelay=yes\n\n[Install]\nWantedBy=sockets.target\n'
}

desktop_entry() {
    printf '[Desktop Entry]\nType=Application\nName=llmq\nIcon=network-server\n'
    printf 'Comment=The queue in front of the local LLM runners\nCategories=Utility;\n'
    printf 'Exec="%s"\n' "$(percent "$prefix/bin/llmq-tray")"
}

launch_agent() { # nobody has tried it on a Mac
    "$python" -I - "$label" "$HOME/Library/Logs/llmq.log" "$python" -I -u "$library" serve <<'END'
import plistlib, sys; label, log, *command = sys.argv[1:]
sys.stdout.buffer.write(plistlib.dumps({
    "Label": label, "ProgramArguments": command, "RunAtLoad": True,
    "KeepAlive": {"SuccessfulExit": False}, "ThrottleInterval": 5, "ExitTimeOut": 45,
    "ProcessType": "Interactive", "StandardOutPath": log, "StandardErrorPath": log}))
END
}

# ---- Install and uninstall -----------------------------------------------------------------------
install_files() {
    # "python3 -I $library" runs __main__.py, which imports llmq from there and from nowhere else.
    printf 'import sys\n\nimport llmq\n\nsys.exit(llmq.main())\n' >"$scratch/__main__.py"
    tag=$("$python" -I -c 'import sys; print(sys.implementation.cache_tag)')
    for source in "$here/llmq.py" "$scratch/__main__.py"; do
        name=${source##*/} && put 644 "$library/$name" cat "$source"
        put 644 "$library/__pycache__/${name%.py}.$tag.pyc" bytecode "$source" "$library/$name"
    done
    put 755 "$prefix/bin/llmq" launcher "$python" -I "$library"
    if [ "$tray" ]; then
        for source in "$here"/tray/*; do
            [ ! -f "$source" ] || put 644 "$library/tray/${source##*/}" cat "$source"
        done
        put 755 "$prefix/bin/llmq-tray" launcher "$tray_python" "$library/tray/llmq_tray.py"
        [ "$mac" ] || put 644 "$desktop" desktop_entry
    fi
    [ -z "$mac" ] || { put 644 "$agent" launch_agent && return 0; }
    put 644 "$units/llmq.service" service_unit
    [ -z "$socket" ] || put 644 "$units/llmq.socket" socket_unit
    try_sandbox
    if [ "$sandbox" = yes ]; then
        put 644 "$drop_in" sandbox_unit
        # In the sandbox llmq cannot make the folder of its state itself.
        [ -n "$dry" ] || mkdir -p "$DESTDIR$HOME/.local/state/llmq" || die 1 "no folder for it"
    else
        drop "$drop_in"
    fi
}

start_unit() { # what runs already and has not changed is left alone
    set -- llmq.service ${socket:+llmq.socket} && again=
    has_user_manager || { echo "to start it: systemctl --user daemon-reload &&" \
        "systemctl --user enable --now $*" && return 0; }
    case $changed in *" llmq.s"* | *" 10-sandbox"*) systemctl --user daemon-reload ;; esac
    case $changed in
        *" llmq.socket "*) systemctl --user stop llmq.service || : && again=llmq.socket ;;
        *" llmq.py "* | *" llmq.service "* | *" 10-sandbox.conf "*) again=llmq.service ;;
    esac
    { systemctl --user --quiet enable "$@" &&
        { [ -z "$again" ] || systemctl --user restart "$again"; } &&
        systemctl --user start "$@"; } || die 1 "it did not start: journalctl --user -u llmq"
    echo "it runs: systemctl --user status llmq; also after logout: loginctl enable-linger"
}

start_agent() {
    domain=gui/$(id -u) tries=5
    case $changed in
        *" llmq.py "* | *" $label.plist "*) launchctl bootout "$domain/$label" 2>/dev/null || : ;;
        *) ! launchctl print "$domain/$label" >/dev/null 2>&1 || return 0 ;;
    esac
    until launchctl bootstrap "$domain" "$agent"; do # it fails while the old one is still ending
        [ $((tries -= 1)) -gt 0 ] || die 1 "it did not start: $HOME/Library/Logs/llmq.log"
        sleep 1
    done
}

uninstall() {
    if [ "$mac" ] && [ -e "$agent" ] && [ -z "$DESTDIR$dry" ] && [ "$start" ]; then
        launchctl bootout "gui/$(id -u)/$label" 2>/dev/null || :
    elif [ -z "$mac" ] && [ -e "$units/llmq.service" ] && has_user_manager; then
        systemctl --user --quiet disable --now llmq.service ${socket:+llmq.socket} || :
        systemctl --user reset-failed llmq.service 2>/dev/null || : # so that it forgets the unit
    fi
    [ ! -L "$DESTDIR$library" ] || drop "$library" # the link alone
    drop "$prefix/bin/llmq" "$prefix/bin/llmq-tray" "$library/llmq.py" "$library/__main__.py" \
        "$library/__pycache__" "$library/tray" "$desktop" "$etc/autostart/llmq-tray.desktop" \
        "$agent" "${agent%.plist}-tray.plist" "$HOME/Library/Logs/llmq.log" \
        "$HOME/.cache/llmq-tray" "$state/llmq/llmq.log" "$state/llmq/llmq.png" \
        "$units/llmq.service" "$drop_in" "$units/llmq.socket" \
        "$units/default.target.wants/llmq.service" "$units/sockets.target.wants/llmq.socket"
    [ -z "$purge" ] ||
        drop "$config/llmq.env" "$config/llmq.toml" "$config/llmq.json" "$config/tray.json" \
            "$state/llmq/llmq.db" "$state/llmq/llmq.db-wal" "$state/llmq/llmq.db-shm"
    set -- "$DESTDIR$HOME/.local" && [ -n "$dry" ] ||
        rmdir "$1/state/llmq" "$1/state" "$1" 2>/dev/null || : # those that are empty
    [ "$changed" ] || echo "nothing of llmq is here"
    case $changed in *" llmq.s"*) ! has_user_manager || systemctl --user daemon-reload ;; esac
}

HOME=${HOME-} DESTDIR=${DESTDIR-} changed='' mac=''
prefix=${HOME%/}/.local socket='' sandbox=auto tray='' start=yes dry='' action=install purge=''
while [ $# -gt 0 ]; do
    case $1 in
        --prefix=*) prefix=${1#*=} ;;
        --prefix) prefix=${2-} && shift $(($# > 1)) ;;
        --sandbox=*) sandbox=${1#*=} ;;
        --sandbox) case ${2-} in auto | yes | no) sandbox=$2 && shift ;; *) sandbox=yes ;; esac ;;
        --socket-activated) socket=yes ;;
        --tray) tray=yes ;;
        --no-start) start='' ;;
        --dry-run) dry=yes ;;
        --uninstall) action=uninstall ;;
        --purge) purge=yes ;;
        -h | --help) usage && exit 0 ;;
        *) die 2 "unknown option $1, see --help" ;;
    esac
    shift
done
quotable "$prefix"
for path in "$HOME" "$prefix" "${DESTDIR:-/}"; do
    case $path in /*) ;; *) die 2 "HOME, DESTDIR and --prefix begin with /, not so: '$path'" ;; esac
done
HOME=${HOME%/} prefix=${prefix%/} DESTDIR=${DESTDIR%/}
case $sandbox in auto | yes | no) ;; *) die 2 "--sandbox is auto, yes or no" ;; esac
[ -z "$purge" ] || [ $action = uninstall ] || die 2 "--purge goes with --uninstall"
case ${XDG_CONFIG_HOME-} in /*) etc=${XDG_CONFIG_HOME%/} ;; *) etc=$HOME/.config ;; esac
case ${XDG_STATE_HOME-} in /*) state=$XDG_STATE_HOME ;; *) state=$HOME/.local/state ;; esac
case ${XDG_DATA_HOME-} in /*) share=${XDG_DATA_HOME%/} ;; *) share=$HOME/.local/share ;; esac
units=$etc/systemd/user drop_in=$etc/systemd/user/llmq.service.d/10-sandbox.conf
library=$prefix/lib/llmq label=local.llmq config=$HOME/.config/llmq # not XDG's: as llmq reads it
desktop=$share/applications/llmq-tray.desktop agent=$HOME/Library/LaunchAgents/$label.plist
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
[ "$(uname -s)" != Darwin ] || mac=yes
[ -z "$mac" ] || [ -z "$socket" ] || die 2 "--socket-activated needs systemd"
[ ! -e "$DESTDIR$units/llmq.socket" ] || socket=yes
[ ! -e "$DESTDIR$library/tray" ] || [ ! -d "$here/tray" ] || tray=yes
if [ $action = uninstall ]; then uninstall; exit 0; fi
[ -e "$here/llmq.py" ] || die 1 "llmq.py is not beside install.sh"
[ -z "$tray" ] || [ -e "$here/tray/llmq_tray.py" ] || die 1 "tray/ is not beside install.sh"
scratch=$(mktemp -d) part=''
trap 'rm -rf "$scratch" "$part"' EXIT && trap 'exit 1' HUP INT TERM
[ ! -L "$DESTDIR$library" ] || die 1 "$library is a link: what is there may be another's"
find_python; quotable "$python" "$tray_python"; read_settings; install_files
[ -z "$dry$DESTDIR" ] || exit 0
if [ "$mac" ]; then [ -z "$start" ] || start_agent; else start_unit; fi
case :$PATH: in *:"$prefix/bin":*) ;; *) echo "not on your PATH: $prefix/bin" ;; esac
[ -z "$tray" ] || "$tray_python" -c 'import sys; del sys.path[0]
from importlib.util import find_spec as f; sys.exit(not (f("pystray") and f("PIL")))' ||
    echo "for the tray: $tray_python -m pip install pystray pillow, or the packages of your system"
echo "for clients: OPENAI_BASE_URL=http://127.0.0.1:$port/v1"
