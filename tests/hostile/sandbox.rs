//! The sandbox: what an intruder can no longer do, that PROG has nothing of it, and kernels that lack it.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use starttls_wrapper::session::Way;

use crate::child::{Child, puppet};
use crate::door::{Door, Shape, Start, free_address};
use crate::steps::{At, Standing};
use crate::stream::wait_until;
use crate::table::Table;
use crate::trace::Trace;
use crate::wire::PATIENCE;

const SIGABRT: i32 = 6;
const SIGSYS: i32 = 31;

/// What an intruder comes to in a session of this command line, with `folder` as CADIR: its one word, or the signal that ended it.
fn intrude(line: &str, folder: &str, deed: &str, object: &str) -> Result<String, i32> {
    let mut program = Command::new(puppet().with_file_name("intruder"));
    program.args([deed, object]).args(line.split(' '));
    // A system without a bundle of roots would have its folder read.
    let roots = if folder.is_empty() { ("SSL_CERT_FILE", "/dev/null") } else { ("CADIR", folder) };
    let output = program.env_clear().envs([roots]).output().unwrap();
    match output.status.signal() {
        Some(signal) => Err(signal),
        None => Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))),
    }
}

const KEEP: &str = "--way keep prog";
const LISTENER: &str = "--listen 127.0.0.1:2525 --way keep prog";
const ADDRESS: &str = "127.0.0.1 465 prog";
const NAME: &str = "mx.example 465 prog";

#[test]
fn what_only_an_intruder_asks_for_kills() {
    let parent = std::process::id().to_string();
    for line in [ADDRESS, KEEP, LISTENER, NAME] {
        assert_eq!(intrude(line, "", "nothing", ""), Ok("done\n".to_owned()), "{line}");
        let deeds = [("become", "/bin/true"), ("trace", &parent), ("peek", &parent)];
        let of_memory = [("execute-mapped", ""), ("execute-written", "")];
        // A static glibc's resolver may load libraries.
        let may_execute = line == NAME && cfg!(target_env = "gnu");
        let of_memory = of_memory.into_iter().filter(|_| !may_execute);
        let thread = (line != NAME).then_some(("thread", ""));
        for (deed, object) in deeds.into_iter().chain(of_memory).chain(thread) {
            assert_eq!(intrude(line, "", deed, object), Err(SIGSYS), "{line}: {deed}");
        }
    }
}

/// What a bug of ours that can't be survived ends as is for its supervisor to see. A listener's is in a thread, whose number is not the
/// process's.
#[test]
fn an_abort_is_seen_as_one_and_nobody_else_is_aborted() {
    let mut another = Command::new("/bin/cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let object = another.id().to_string();
    let refused = "Operation not permitted (os error 1)\n".to_owned();
    for line in [ADDRESS, KEEP, LISTENER, NAME] {
        assert_eq!(intrude(line, "", "abort", ""), Err(SIGABRT), "{line}");
        assert_eq!(intrude(line, "", "abort-another", &object), Ok(refused.clone()), "{line}");
    }
    drop(another.stdin.take());
    assert_eq!(another.wait().unwrap().code(), Some(0));
}

/// What fails, and how: `P` is the filter's answer, `A` Landlock's, `K` the filter's end of all, `-` none.
#[test]
fn everything_else_is_refused_or_needed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, other) = (listener.local_addr().unwrap().port(), TcpListener::bind("127.0.0.1:0").unwrap());
    let (here, there) = (port.to_string(), other.local_addr().unwrap().port().to_string());
    let (folder, believed) = (tempfile::TempDir::new().unwrap(), tempfile::TempDir::new().unwrap());
    let [mine, roots] = [&folder, &believed].map(|folder| {
        let path = folder.path().join("root.pem");
        fs::write(&path, "x").unwrap();
        path.to_str().unwrap().to_owned()
    });
    let believed = believed.path().to_str().unwrap();
    let (address, name) = (format!("127.0.0.1 {port} prog"), format!("mx.example {port} prog"));
    let parent = std::process::id().to_string();
    // Deed, object, and the answers: with an address and nothing to read, an address and roots to read, a name, no HOST, a listener without HOST.
    let table = [
        ("read", mine.as_str(), "PAAPP"),
        ("read", &roots, "P-APP"),
        ("write", &roots, "PPPPP"),
        ("list", "/etc", "PAAPP"),
        ("connect", &here, "---PP"),
        ("connect", &there, "AAAPP"),
        ("unix", "/dev/log", "PPPPP"),
        ("listen", "", "PPPPP"),
        ("udp", "", "PP-PP"),
        ("run", "/bin/true", "KKKKK"),
        ("signal", &parent, "PPPPP"),
    ];
    let mut wrong = Vec::new();
    for (deed, object, answers) in table {
        let lines = [(&*address, ""), (&address, believed), (&name, ""), (KEEP, ""), (LISTENER, "")];
        for ((line, folder), answer) in lines.into_iter().zip(answers.chars()) {
            let expected = match answer {
                'P' => Ok("Operation not permitted (os error 1)\n"),
                'A' => Ok("Permission denied (os error 13)\n"),
                'K' => Err(SIGSYS),
                _ => Ok("done\n"),
            };
            let came = intrude(line, folder, deed, object);
            if came.as_deref().map_err(|signal| *signal) != expected {
                wrong.push(format!("{line} {folder:?}: {deed} {object}: {came:?}, not {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for line in [&address, KEEP, LISTENER] {
        let refused = "Operation not permitted (os error 1)\n".to_owned();
        assert_eq!(intrude(line, "", "tell", "/dev/log"), Ok(refused), "{line}: a last word to somebody else");
        // No socket: the C libraries have words of their own for it.
        let passed = intrude(line, "", "say", "").unwrap();
        assert!(passed.ends_with("(os error 88)\n"), "{line}: a last word: {passed}");
    }
    assert_eq!(intrude(&name, "", "thread", ""), Ok("done\n".to_owned()), "the resolver's");
}

/// A field of /proc/PID/status.
fn field(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap_or_default().to_owned()
}

/// The client goes; what the program has said then.
fn ended(standing: &mut Standing) -> String {
    standing.door.client = None;
    let _ = standing.child.rest().unwrap();
    standing.child.exit(0);
    assert_eq!(standing.door.code(), 1);
    standing.door.said()
}

#[test]
fn the_program_is_confined_and_its_child_is_not() {
    let (on, off) = ("]: debug: sandbox: Landlock and seccomp\n", "]: sandbox: off (--no-sandbox)\n");
    for (options, filter, words) in [(&["-v"][..], "2", on), (&["--no-sandbox"], "0", off)] {
        let mut standing =
            Standing::at(At::Snoop, &Start { options, environment: &[("RUST_LOG", "")], ..Start::default() });
        let (pid, child) = (standing.door.pid().as_raw_nonzero().get().unsigned_abs(), standing.child.report.pid);
        assert_eq!((field(pid, "Seccomp"), field(pid, "NoNewPrivs")), (filter.to_owned(), "1".to_owned()));
        assert_eq!((field(child, "Seccomp"), field(child, "NoNewPrivs")), ("0".to_owned(), "0".to_owned()));
        let said = ended(&mut standing);
        assert!(said.contains(words), "{said}");
        assert_eq!(said.matches("sandbox:").count(), 1, "{said}");
    }
}

/// Their memory is one: who has a thread that is not confined has them all.
#[test]
fn every_thread_of_a_listener_is_confined_and_whom_it_starts_is_not() {
    let (on, off) = ("]: debug: sandbox: Landlock and seccomp\n", "]: sandbox: off (--no-sandbox)\n");
    for (options, filter, words) in [(&["-v"][..], "2", on), (&["--no-sandbox"], "0", off)] {
        let environment = &[("RUST_LOG", "")];
        let door = Door::open(&Start { options, environment, shape: Shape::Listener, ..Start::default() });
        let pid = door.pid().as_raw_nonzero().get().unsigned_abs();
        let prog = Child::accept(&door.puppets).unwrap();
        let child = prog.report.pid;
        let threads: Vec<u32> = fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        assert_eq!(threads.len(), 2, "the loop, and who waits for signals and probes");
        for thread in threads {
            assert_eq!((field(thread, "Seccomp"), field(thread, "NoNewPrivs")), (filter.to_owned(), "1".to_owned()));
        }
        let spawner: u32 = field(child, "PPid").parse().unwrap();
        assert_eq!(field(spawner, "PPid"), pid.to_string());
        for free in [spawner, child] {
            assert_eq!((field(free, "Seccomp"), field(free, "NoNewPrivs")), ("0".to_owned(), "0".to_owned()));
        }
        let said = door.said();
        assert!(said.contains(words), "{said}");
        assert_eq!(said.matches("sandbox:").count(), 1, "it is said once, not for each thread: {said}");
    }
}

/// Clients wait before the first of many threads is confined.
#[test]
fn a_listener_accepts_nobody_before_every_thread_is_confined() {
    const WORKERS: usize = 12;
    let address = "127.86.0.1:2525";
    let trace = Trace::of(&["-f", "-e", "trace=seccomp,accept4"]);
    let (mut words, workers) = (trace.through(), WORKERS.to_string());
    words.extend([env!("CARGO_BIN_EXE_starttls-wrapper"), "--listen", address, "--lazy=no", "--workers", &workers]);
    words.extend(["--trusted-loopback", "127.0.0.1", "1", "/bin/true"]);
    let mut program = Command::new(words[0]).args(&words[1..]).env_clear().stderr(Stdio::null()).spawn().unwrap();
    let mut clients = Vec::new();
    assert!(wait_until(PATIENCE, || {
        clients.extend(TcpStream::connect(address));
        clients.len() == 3 * WORKERS
    }));
    for mut client in clients {
        // PROG ends without a word.
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("421 "), "{said}");
    }
    kill_process(Pid::from_child(&program), Signal::TERM).unwrap();
    program.wait().unwrap();
    let log = trace.log();
    let first = log.lines().position(|line| line.contains("accept4(")).unwrap();
    let confined = log.lines().take(first).filter(|line| line.contains("seccomp") && line.ends_with(" = 0")).count();
    assert_eq!(confined, WORKERS + 1, "{log}");
}

/// A kernel from before Linux 6.7 is asked for its version of Landlock.
const OLDER_LANDLOCK: &str = "inject=landlock_create_ruleset:retval=2:when=1";
const WITHOUT_TCP: &str = "without Landlock's TCP ports (version 2 knows none: any can be connected to)";

/// The program itself, its dial bent to another port as an intruder would (strace writes over the address).
#[test]
fn the_program_reaches_no_port_but_the_backends() {
    let of_this_kernel = "inject=connect:delay_enter=0";
    for (options, landlock, reaches) in
        [(&[][..], of_this_kernel, false), (&["--no-sandbox"], of_this_kernel, true), (&[], OLDER_LANDLOCK, true)]
    {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        other.set_nonblocking(true).unwrap();
        let bent = format!("inject=connect:poke_enter=@arg2=0200{:04x}7f000001", other.local_addr().unwrap().port());
        let trace = Trace::of(&["-e", "trace=connect,landlock_create_ruleset", "-e", landlock, "-e", &bent]);
        let mut standing = Standing::at(At::Snoop, &Start { options, through: &trace.through(), ..Start::default() });
        let client = standing.door.client.as_mut().unwrap();
        client.send(b"STARTTLS\r\n");
        if reaches {
            assert!(wait_until(PATIENCE, || other.accept().is_ok()), "{}", standing.door.said());
        }
        client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
        let said = ended(&mut standing);
        assert_eq!(said.contains(": Permission denied (os error 13)"), !reaches, "{said}");
        assert!(trace.log().contains("(INJECTED"));
    }
}

/// A kernel without one of them, or without both: the session goes on and the log says so, in one line that is no warning.
#[test]
fn what_the_kernel_lacks_is_said_and_the_session_goes_on() {
    let why = |number| std::io::Error::from_raw_os_error(number).to_string();
    let (no_landlock, no_seccomp) = (format!("Landlock ({})", why(95)), format!("seccomp ({})", why(38)));
    let (landlock, seccomp) = ("inject=landlock_create_ruleset:error=EOPNOTSUPP", "inject=seccomp:error=ENOSYS");
    for (injected, without) in [
        (&[OLDER_LANDLOCK][..], WITHOUT_TCP.trim_start_matches("without ").to_owned()),
        (&[landlock], no_landlock.clone()),
        (&[seccomp], no_seccomp.clone()),
        (&[landlock, seccomp], format!("{no_landlock} and {no_seccomp}")),
    ] {
        let mut words = vec!["-e".to_owned(), "trace=landlock_create_ruleset,seccomp".to_owned()];
        words.extend(injected.iter().flat_map(|call| ["-e".to_owned(), call.to_string()]));
        let trace = Trace::of(&words.iter().map(String::as_str).collect::<Vec<_>>());
        let mut standing = Standing::at(At::Snoop, &Start { through: &trace.through(), ..Start::default() });
        let said = ended(&mut standing);
        let expected = format!("]: sandbox: without {without}\n");
        assert!(said.contains(&expected) && said.lines().count() == 2, "{said}");
        assert!(trace.log().contains("(INJECTED"));
    }
}

#[test]
fn a_landlock_without_tcp_is_said_once_and_only_where_somebody_is_dialled() {
    for (way, is_said) in [(Way::Tls, true), (Way::Keep, false)] {
        let trace = Trace::of(&["-f", "-e", "trace=landlock_create_ruleset", "-e", OLDER_LANDLOCK]);
        let (metrics, through) = (free_address().to_string(), trace.through());
        let options = &["--workers", "3", "--metrics", &metrics];
        let door = Door::open(&Start { options, through: &through, shape: Shape::Listener, ..Start::by(way) });
        let said = door.said();
        assert_eq!(said.contains(&format!("]: sandbox: {WITHOUT_TCP}\n")), is_said, "{said}");
        assert_eq!(said.matches("sandbox:").count(), usize::from(is_said), "{said}");
        drop(door);
        assert_eq!(trace.log().matches("(INJECTED").count(), 5, "{}", trace.so_far());
    }
    let trace = Trace::of(&["-e", "trace=landlock_create_ruleset", "-e", OLDER_LANDLOCK]);
    let mut session = Standing::at(At::Snoop, &Start { through: &trace.through(), ..Start::by(Way::Keep) });
    let said = ended(&mut session);
    assert!(!said.contains("sandbox:") && trace.log().contains("(INJECTED"), "no socket is to be had: {said}");
}

#[test]
fn the_check_warns_of_a_landlock_without_tcp() {
    for (host, verdict, words) in
        [("127.0.0.1", "warning", WITHOUT_TCP), ("unix:/nonexistent", "ok", "what follows was tried inside it")]
    {
        let trace = Trace::of(&["-e", "trace=landlock_create_ruleset", "-e", OLDER_LANDLOCK]);
        let through = trace.through();
        let mut command = Command::new(through[0]);
        command.args(&through[1..]).args([env!("CARGO_BIN_EXE_starttls-wrapper"), "--check", "--way", "plain", host]);
        command.args(host.starts_with("127").then_some("1")).arg("/bin/true").env_clear().stderr(Stdio::null());
        Table::of(&mut command).has(verdict, "sandbox", words);
        assert!(trace.log().contains("(INJECTED"));
    }
}
