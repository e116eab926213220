//! A listener under a supervisor: sockets that it is left, the moment at which it is ready, and its end in peace.

use std::fs;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, test_kill_process};

use crate::child::Child;
use crate::door::{Door, Shape, Start};
use crate::stream::{wait_readable, wait_until};
use crate::supervised::{PASSES, Supervised, address, children, holder, waits};
use crate::trace::Trace;
use crate::wire::{End, PATIENCE, Wire};

/// Without probes, and without a word about loopback.
const WORDS: [&str; 8] = ["--listen", "fd:3", "--notify-fd", "4", "--workers", "2", "--lazy=no", "--way"];

fn words<'a>(options: &[&'a str], prog: &[&'a str]) -> Vec<&'a str> {
    [&WORDS[..], &["keep", "--self-signed", "mx.example"], options, prog].concat()
}

/// A server of one line that stays until its client goes.
const GREETS: [&str; 3] = ["/bin/sh", "-c", r"printf '220 %s:%s\r\n' $TCPLOCALIP $TCPLOCALPORT; cat >/dev/null"];

fn client(of: &TcpListener) -> Wire {
    Wire::new(TcpStream::connect(address(of)).unwrap())
}

const LISTENS: Start<'_> = Start { shape: Shape::Listener, ..Start::USUAL };

fn greet(door: &mut Door, child: &mut Child) {
    child.send(b"220 mail.example ESMTP\r\n");
    door.client.as_mut().unwrap().get(b"220 mail.example ESMTP\r\n").unwrap();
}

#[test]
fn a_socket_that_was_left_for_us_is_served_by_all_loops() {
    let holder = holder();
    let listener = Supervised::ready(PASSES, holder.try_clone().unwrap(), &words(&[], &GREETS));
    assert!(
        listener.said().contains(&format!("listening on fd:3={}, loops=2", address(&holder))),
        "{}",
        listener.said()
    );
    let greeting = format!("220 {}\r\n", address(&holder));
    let mut clients: Vec<Wire> = (0..8).map(|_| client(&holder)).collect();
    clients.iter_mut().for_each(|client| client.get(greeting.as_bytes()).unwrap());
}

#[test]
fn systemds_sockets_are_served_and_prog_hears_nothing_of_systemd() {
    let holder = holder();
    let script = format!("export LISTEN_FDS=1 LISTEN_PID=$$ LISTEN_FDNAMES=smtp WATCHDOG_USEC=9; {PASSES}");
    let prog =
        ["/bin/sh", "-c", r"printf '220 %s\r\n' $(env | grep -cE '^(LISTEN_|NOTIFY_|WATCHDOG_)'); cat >/dev/null"];
    let words: Vec<&str> =
        words(&[], &prog).iter().map(|word| if *word == "fd:3" { "systemd" } else { word }).collect();
    let _listener = Supervised::ready(&script, holder.try_clone().unwrap(), &words);
    client(&holder).get(b"220 0\r\n").unwrap();
}

#[test]
fn what_is_no_listening_tcp_socket_is_a_usage_error() {
    let listens = holder();
    let connected = TcpStream::connect(address(&listens)).unwrap();
    let folder = tempfile::TempDir::new().unwrap();
    let others: [(OwnedFd, &str); 5] = [
        (fs::File::open("/dev/null").unwrap().into(), "a file"),
        (connected.into(), "a connection"),
        (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "UDP"),
        (UnixListener::bind(folder.path().join("s")).unwrap().into(), "a UNIX socket"),
        (rustix::pipe::pipe().unwrap().0, "a pipe"),
    ];
    for (passed, what) in others {
        let mut program = Supervised::start(PASSES, passed, &words(&[], &GREETS));
        assert_eq!(program.code(), Some(100), "{what}: {}", program.said());
        assert!(program.said().contains("fd:3: it is no TCP socket that listens"), "{what}: {}", program.said());
        assert_eq!(program.line(), None, "{what}");
    }
}

#[test]
fn what_a_supervisor_can_t_have_meant_is_a_usage_error() {
    let program = env!("CARGO_BIN_EXE_starttls-wrapper");
    let nobodys = [("LISTEN_FDS", "1"), ("LISTEN_PID", "1")];
    for (words, environment, said) in [
        ("--listen fd:9 --way keep p", &[][..], "--listen fd 9: no such descriptor was left for us"),
        ("--listen fd:2 --way keep p", &[], "fd:N with N above 2"),
        ("--listen fd:x --way keep p", &[], "fd:N with N above 2"),
        ("--listen fd:3 --listen fd:3 --way keep p", &[], "descriptor 3 is named twice"),
        ("--listen fd:3 --notify-fd 3 --way keep p", &[], "descriptor 3 is named twice"),
        ("--listen systemd --way keep p", &[], "LISTEN_FDS and LISTEN_PID are not set"),
        ("--listen systemd --way keep p", &nobodys[..1], "LISTEN_FDS and LISTEN_PID are not set"),
        ("--listen systemd --way keep p", &nobodys, "the sockets are another process's"),
        ("--listen 127.0.0.1:1 --notify-fd 9 --way keep p", &[], "--notify-fd 9: no such descriptor"),
        (
            "--listen 127.0.0.1:1 --notify-fd 1 --way keep p",
            &[],
            "--notify-fd takes the number of a descriptor above 2",
        ),
        ("--drain 5 --way keep p", &[], "--drain is a listener's: --listen is missing"),
        ("--notify-fd 4 --way keep p", &[], "--notify-fd is a listener's: --listen is missing"),
        ("--listen 127.0.0.1:1 --drain x --way keep p", &[], "--drain wants a number"),
    ] {
        let mut command = Command::new(program);
        let out = command.args(words.split(' ')).env_clear().envs(environment.iter().copied()).output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(100), "{words}: {stderr}");
        assert!(stderr.contains(said), "{words}: {stderr}");
    }
    let script = format!("export LISTEN_FDS=0 LISTEN_PID=$$; {PASSES}");
    let mut none = Supervised::start(&script, holder(), &["--listen", "systemd", "--way", "keep", "p"]);
    assert_eq!(none.code(), Some(100), "{}", none.said());
    assert!(none.said().contains("LISTEN_FDS must be a number from 1 to"), "{}", none.said());
}

/// PROG goes on without us, and the spawner with it. Neither has the socket.
#[test]
fn a_port_is_free_when_the_program_is_gone_whoever_is_left() {
    let holder = holder();
    let at = address(&holder);
    let prog = ["/bin/sh", "-c", r"printf '220 %s\r\n' $$; exec sleep 60"];
    let mut listener = Supervised::ready(PASSES, holder.try_clone().unwrap(), &words(&[], &prog));
    let mut one = client(&holder);
    one.listen_for_line();
    let greeting = String::from_utf8(one.left_over()).unwrap();
    let prog = Pid::from_raw(greeting.trim_start_matches("220 ").trim().parse().unwrap()).unwrap();
    let [spawner] = listener.helpers("spawner")[..] else { panic!("one spawner") };
    drop(holder);
    listener.kill(Signal::KILL);
    listener.end_within(PATIENCE);
    let is_free = wait_until(PATIENCE, || TcpStream::connect(at).is_err());
    let are_left = [prog, spawner].map(|pid| test_kill_process(pid).is_ok());
    kill_process(prog, Signal::KILL).unwrap();
    assert_eq!((is_free, are_left), (true, [true; 2]));
    assert!(wait_until(PATIENCE, || test_kill_process(spawner).is_err()), "the spawner is left for ever");
}

#[test]
fn readiness_is_told_when_the_first_probe_has_succeeded_and_not_before() {
    let holder = holder();
    let folder = tempfile::TempDir::new().unwrap();
    let place = folder.path().to_str().unwrap();
    let prog = "echo >> \"$1/started\"; while [ -e \"$1/started\" ] && ! [ -e \"$1/go\" ]; do sleep 0.01; done; printf '220 x\\r\\n'; \
                while read line; do printf '250 x\\r\\n'; done";
    let prog = ["/bin/sh", "-c", prog, "server", place];
    let words = [&WORDS[..6], &["--way", "keep", "--self-signed", "mx.example"], &prog].concat();
    let mut listener = Supervised::start(PASSES, holder.try_clone().unwrap(), &words);
    assert!(wait_until(PATIENCE, || folder.path().join("started").exists()), "{}", listener.said());
    assert!(listener.is_silent() && !listener.said().contains("listening"), "{}", listener.said());
    fs::write(folder.path().join("go"), "").unwrap();
    assert_eq!(listener.line(), Some(b'\n'), "{}", listener.said());
    assert_eq!(listener.line(), None, "the descriptor is closed behind its line");
    assert_eq!(listener.next_notice(), "READY=1");
    client(&holder).get(b"220 x\r\n").unwrap();
    listener.kill(Signal::HUP);
    let reloading = listener.next_notice();
    let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").and_then(|since| since.parse::<i64>().ok());
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec * 1_000_000;
    assert!(since.is_some_and(|since| (now - since).abs() < 60_000_000), "{reloading:?}, {now}");
    assert_eq!(listener.next_notice(), "READY=1");
    listener.kill(Signal::TERM);
    assert_eq!(listener.next_notice(), "STOPPING=1");
}

#[test]
fn an_abstract_notify_socket_is_told_from_inside_the_sandbox() {
    use std::os::linux::net::SocketAddrExt;
    let name = format!("starttls-wrapper-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let socket = std::os::unix::net::UnixDatagram::bind_addr(&address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let script = format!("export NOTIFY_SOCKET=@{name}; {PASSES}");
    let listener = Supervised::ready(&script, holder(), &words(&[], &GREETS));
    let mut octets = [0; 64];
    let mut next = || socket.recv(&mut octets).map(|count| String::from_utf8_lossy(&octets[..count]).into_owned());
    assert_eq!(next().unwrap(), "READY=1");
    listener.kill(Signal::TERM);
    assert_eq!(next().unwrap(), "STOPPING=1");
}

#[test]
fn who_can_t_begin_is_never_ready() {
    let taken = holder();
    let at = address(&taken).to_string();
    let silent = ["/bin/sh", "-c", "exit"];
    for (words, said) in [
        (&["--listen", &at, "--notify-fd", "4", "--way", "keep", "p"][..], "can't listen on"),
        (&["--listen", "fd:3", "--listen", &at, "--notify-fd", "4", "--way", "keep", "p"], "can't listen on"),
        (&[&WORDS[..6], &["--way", "keep"], &silent].concat(), "can't learn what the server says"),
    ] {
        let mut program = Supervised::start(PASSES, holder(), words);
        assert_eq!(program.code(), Some(111), "{}", program.said());
        assert!(program.said().contains(said), "{}", program.said());
        assert_eq!((program.line(), program.notified()), (None, None), "{}", program.said());
    }
}

#[test]
fn behind_sigterm_sessions_go_on_and_nobody_new_is_served() {
    let mut door = Door::open(&LISTENS);
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    door.kill(Signal::TERM);
    // No client is tried: it might be one of those that wait in the queue, and are served.
    let address = door.address.unwrap();
    assert!(wait_until(PATIENCE, || TcpListener::bind(address).is_ok()), "{}", door.said());
    let client = door.client.as_mut().unwrap();
    client.send(b"MAIL FROM:<a@b.example>\r\n");
    child.get(b"MAIL FROM:<a@b.example>\r\n").unwrap();
    child.send(b"250 ok\r\n");
    client.get(b"250 ok\r\n").unwrap();
    client.send(b"QUIT\r\n");
    child.get(b"QUIT\r\n").unwrap();
    child.send(b"221 bye\r\n");
    child.exit(0);
    client.get(b"221 bye\r\n").unwrap();
    assert_eq!(client.get_end(), Ok(End::Clean));
    door.client = None;
    // Long before the time is over.
    assert_eq!(door.code(), 0, "{}", door.said());
    assert!(door.said().contains("nobody new is served: sessions=1 have 30 s to end"), "{}", door.said());
}

#[test]
fn when_the_time_is_over_or_a_second_signal_comes_sessions_hear_421() {
    for (options, is_again) in [(&["--drain", "4"][..], false), (&[], true)] {
        let mut door = Door::open(&Start { options, ..LISTENS });
        let mut child = Child::accept(&door.puppets).unwrap();
        greet(&mut door, &mut child);
        door.kill(Signal::TERM);
        assert!(wait_until(PATIENCE, || door.said().contains("nobody new is served")), "{}", door.said());
        let client = door.client.as_mut().unwrap();
        client.listen_for(Duration::from_millis(300));
        assert!(!client.has_received(), "not at once");
        if is_again {
            door.kill(Signal::INT);
        }
        let client = door.client.as_mut().unwrap();
        client.get(b"421 4.3.2 Service shutting down\r\n").unwrap();
        assert_eq!(client.get_end(), Ok(End::Clean));
        child.exit(0);
        assert_eq!(door.code(), 0, "{}", door.said());
    }
}

/// Descriptors are made scarce so that clients wait in the queue for certain.
#[test]
fn who_waits_in_the_queue_when_it_stops_is_still_served() {
    let mut door = Door::open(&LISTENS);
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    let (first, whole) = (door.client.take(), scarce(door.pid()));
    door.connect();
    assert!(wait_until(PATIENCE, || door.said().contains("can't accept for 100 ms")), "{}", door.said());
    door.kill(Signal::TERM);
    assert!(wait_until(PATIENCE, || door.said().contains("nobody new is served")), "{}", door.said());
    prlimit(Some(door.pid()), Resource::Nofile, whole).unwrap();
    let mut waited = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut waited);
    drop((first, child));
}

/// Takes the room for one more descriptor from a process, which has all numbers below 4. Returns what it had.
fn scarce(pid: Pid) -> Rlimit {
    let limit = Rlimit { current: Some(4), ..getrlimit(Resource::Nofile) };
    prlimit(Some(pid), Resource::Nofile, limit).unwrap()
}

#[test]
fn without_descriptors_it_neither_spins_nor_hurts_others_and_recovers() {
    let mut door = Door::open(&LISTENS);
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    let whole = scarce(door.pid());
    let mut first = door.client.take().unwrap();
    door.connect();
    assert!(wait_until(PATIENCE, || door.said().contains("can't accept for 100 ms")), "{}", door.said());
    let (spent, waited) = (door.processor_time(), waits(door.pid()));
    first.send(b"NOOP\r\n");
    child.get(b"NOOP\r\n").unwrap();
    child.send(b"250 ok\r\n");
    first.get(b"250 ok\r\n").unwrap();
    let began = Instant::now();
    door.client.as_mut().unwrap().listen_for(Duration::from_secs(1));
    let (spent, waited) = (door.processor_time() - spent, waits(door.pid()) - waited);
    let tenths = began.elapsed().as_millis() / 100;
    assert!(!door.client.as_ref().unwrap().has_received());
    // Two for each attempt, of which a second has ten, and a few for the dialogue.
    assert!(spent <= Duration::from_millis(100) && u128::from(waited) < 20 + 2 * tenths, "{spent:?}, {waited} waits");
    prlimit(Some(door.pid()), Resource::Nofile, whole).unwrap();
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
}

/// The kernel lies from the third accept on, and never stops: the first takes a client, the second finds nobody behind it.
#[test]
fn without_memory_for_a_connection_it_neither_spins_nor_hurts_others() {
    let trace = Trace::of(&["-f", "-e", "trace=accept4", "-e", "inject=accept4:error=ENOMEM:when=3+"]);
    let mut door = Door::open(&Start { through: &trace.through(), ..LISTENS });
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    let mut first = door.client.take().unwrap();
    // One asks until the lie has begun: who is before it is served.
    door.connect();
    let paused = || door.said().contains("can't accept for 100 ms: ") && door.said().contains("(os error 12)");
    assert!(wait_until(PATIENCE, paused), "{}", door.said());
    let refused = || trace.so_far().matches("ENOMEM").count();
    let (began, at, spent) = (refused(), Instant::now(), door.processor_time());
    assert!(wait_until(PATIENCE, || refused() >= began + 10), "it tries no more");
    let (tried, spent) = (refused() - began, door.processor_time() - spent);
    let tenths = usize::try_from(at.elapsed().as_millis()).unwrap() / 100;
    assert!(
        tried <= tenths + 3 && spent <= Duration::from_millis(150),
        "{tried} accepts in {tenths} tenths, {spent:?}"
    );
    door.client.as_mut().unwrap().listen_for(Duration::ZERO);
    assert!(!door.client.as_ref().unwrap().has_received());
    for _ in 0..3 {
        first.send(b"NOOP\r\n");
        child.get(b"NOOP\r\n").unwrap();
        child.send(b"250 ok\r\n");
        first.get(b"250 ok\r\n").unwrap();
    }
    door.kill(Signal::TERM);
    first.send(b"QUIT\r\n");
    child.get(b"QUIT\r\n").unwrap();
    child.send(b"221 bye\r\n");
    child.exit(0);
    first.get(b"221 bye\r\n").unwrap();
    drop(first);
}

/// As systemd does with `KillMode=control-group`, and a terminal.
#[test]
fn a_signal_to_all_processes_leaves_the_spawner_to_sessions_that_need_it() {
    let mut door = Door::open(&LISTENS);
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
    let [spawner] = children(door.pid(), "spawner")[..] else { panic!("one spawner") };
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        kill_process(spawner, signal).unwrap();
    }
    door.connect();
    let mut child = Child::accept(&door.puppets).unwrap();
    greet(&mut door, &mut child);
}

/// Both loops wait for the same queue: who comes wakes one of them, and not the other only to find nobody there.
#[test]
fn a_connection_wakes_one_of_the_loops_that_share_its_socket() {
    const CLIENTS: u64 = 40;
    let holder = holder();
    let prog = ["/bin/sh", "-c", r"printf '220 mx\r\n'; while read line; do printf '250 x\r\n'; done"];
    let words = [&WORDS[..6], &["--way", "keep", "--self-signed", "mx.example"], &prog].concat();
    let listener = Supervised::ready(PASSES, holder.try_clone().unwrap(), &words);
    listener.says("is started when a client needs it");
    let (before, began) = (listener.waits(), Instant::now());
    let clients: Vec<Wire> = (0..CLIENTS)
        .map(|_| {
            assert!(wait_until(PATIENCE, || listener.sleeps()), "{}", listener.said());
            let mut client = client(&holder);
            client.get(b"220 mx\r\n").unwrap();
            client
        })
        .collect();
    assert!(wait_until(PATIENCE, || listener.sleeps()), "{}", listener.said());
    // And each loop looks at its sessions once a second.
    let (waited, looks) = (listener.waits() - before, 2 * began.elapsed().as_secs());
    assert!((CLIENTS..CLIENTS + CLIENTS / 4 + looks).contains(&waited), "{waited} waits for {CLIENTS} clients");
    drop(clients);
}

/// A socket that others hold stays open when we close it: a loop that still watched it would wake up for each of their clients.
#[test]
fn a_shared_queue_is_left_to_whoever_has_it() {
    let holder = holder();
    let mut listener = Supervised::ready(PASSES, holder.try_clone().unwrap(), &words(&[], &GREETS));
    let mut one = client(&holder);
    one.listen_for_line();
    listener.kill(Signal::TERM);
    listener.says("nobody new is served");
    // Once both loops have heard of it none of them accepts any more.
    let is_left = || {
        let other = TcpStream::connect(address(&holder)).unwrap();
        let mut queued = [rustix::event::PollFd::new(&holder, rustix::event::PollFlags::IN)];
        other.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let is_served = std::io::Read::read(&mut &other, &mut [0; 9]).is_ok();
        let is_queued = rustix::event::poll(&mut queued, Some(&rustix::event::Timespec::default())) == Ok(1);
        if is_queued {
            drop(holder.accept().unwrap());
        }
        !is_served && is_queued
    };
    // One that has not yet run would not have looked either: several times running.
    assert!(wait_until(2 * PATIENCE, || (0..5).all(|_| is_left())), "{}", listener.said());
    let before = listener.waits();
    for _ in 0..50 {
        let _other = TcpStream::connect(address(&holder)).unwrap();
        wait_readable(&holder, Instant::now() + PATIENCE).unwrap();
        drop(holder.accept().unwrap());
    }
    let waited = listener.waits() - before;
    assert!(waited < 10, "{waited} waits for others' clients");
    drop(one);
    assert_eq!(listener.code(), Some(0), "{}", listener.said());
}
