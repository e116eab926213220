//! A UCSPI child that puts PROG off (`--greeting`), and what it believes (`--probe`): who starts PROG and who does not, what a client hears
//! where PROG is not what the file says, and which file is believed.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use rustix::process::{Pid, Signal, kill_process};
use starttls_wrapper::session::Way;
use tempfile::TempDir;

use crate::child::{Child, Report};
use crate::door::{Door, Start, tls_client};
use crate::scripted::{GREETING, SERVER, lines};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

const PROGRAM: &str = env!("CARGO_BIN_EXE_starttls-wrapper");

const ENVIRONMENT: [(&str, &str); 1] = [("PATH", "/usr/bin:/bin")];

/// [`SERVER`]'s folder.
struct Stage(TempDir);

impl Stage {
    fn new(greeting: &str) -> Self {
        let stage = Self(TempDir::new().unwrap());
        stage.greets(greeting);
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn place(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    fn greets(&self, greeting: &str) {
        fs::write(self.path("greeting"), greeting).unwrap();
    }

    fn lines(&self, name: &str) -> Vec<String> {
        lines(self.0.path(), name)
    }

    fn probe(&self) -> Output {
        let mut command = Command::new(PROGRAM);
        command.args(["--probe", "/bin/sh", "-c", SERVER, "server", self.place()]);
        command.env("TCPREMOTEHOST", "stale").output().unwrap()
    }

    /// What a probe prints, as a file; as if nobody had been started for it.
    fn paper(&self) -> String {
        let probed = self.probe();
        assert!(probed.status.success(), "{probed:?}");
        let path = self.path("paper");
        fs::write(&path, probed.stdout).unwrap();
        for name in ["started", "heard"] {
            let _ = fs::remove_file(self.path(name));
        }
        path.to_str().unwrap().to_owned()
    }

    /// A session by this file.
    fn open(&self, paper: &str, start: &Start<'_>) -> Door {
        let program = ["/bin/sh", "-c", SERVER, "server", self.place()];
        let options = [&["--greeting", paper], start.options].concat();
        Door::open(&Start { program: Some(&program), environment: &ENVIRONMENT, options: &options, ..*start })
    }
}

fn talk(door: &mut Door, talk: &[(&str, &str)]) {
    for (line, reply) in talk {
        let client = door.client.as_mut().unwrap();
        client.send(line.as_bytes());
        client.get(reply.as_bytes()).unwrap_or_else(|why| panic!("{line:?}: {why}: {}", door.said()));
    }
}

const GREETS: (&str, &str) = ("", "220 mx\r\n");
const EHLO: (&str, &str) =
    ("EHLO c.example\r\n", "250-mx hello c.example [127.0.0.1]\r\n250-STARTTLS\r\n250 SIZE 9\r\n");
const QUIT: (&str, &str) = ("QUIT\r\n", "221 bye\r\n");

#[test]
fn a_probe_prints_what_two_clients_are_told() {
    let stage = Stage::new(GREETING);
    let probed = stage.probe();
    let text = String::from_utf8(probed.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "# What /bin/sh says to everybody, for --greeting");
    assert_eq!(
        lines[1..],
        [
            "greeting 220 mx",
            "ehlo 250-mx hello %h [%a]",
            "ehlo 250 SIZE 9",
            "noop 250 NOOP",
            "rset 250 RSET",
            "helo 250 HELO %h",
            "quit 221 bye",
        ]
    );
    assert_eq!(stage.lines("started"), ["192.0.2.25", "198.51.100.25"]);
}

#[test]
fn a_prog_that_tells_each_client_something_else_can_t_be_put_off() {
    let stage = Stage::new("printf '220 mx %s\\r\\n' \"$(date +%s%N)\"");
    let probed = stage.probe();
    let said = String::from_utf8_lossy(&probed.stderr);
    assert_eq!((probed.status.code(), probed.stdout.len()), (Some(1), 0), "{said}");
    assert!(said.contains("its reply to greeting is not always the same"), "{said}");
}

#[test]
fn a_prog_that_does_not_serve_is_said_to() {
    let stage = Stage::new("printf '554 no\\r\\n'");
    let probed = stage.probe();
    let said = String::from_utf8_lossy(&probed.stderr);
    assert!(probed.status.code() == Some(111) && said.contains("it greeted with 554"), "{probed:?}");
    for (words, code, why) in [
        (&["--probe", "/no/such/prog"][..], 111, "can't start PROG"),
        (&["--probe"], 100, "PROG is missing: starttls-wrapper --probe"),
        (&["--probe", "--cert", "x", "true"], 100, "--cert says nothing with --probe"),
        (&["--probe", "--listen", "127.0.0.1:9", "true"], 100, "--listen says nothing with --probe"),
        (&["--probe", "127.0.0.1", "25", "true"], 100, "--probe takes no HOST PORT"),
        (&["--greeting", "f", "--mute", "true"], 100, "--greeting says nothing with --mute"),
        (
            &["--greeting", "f", "--listen", "127.0.0.1:9", "localhost", "25", "true"],
            100,
            "--greeting is a UCSPI child's",
        ),
    ] {
        let ended = Command::new(PROGRAM).args(words).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.code() == Some(code) && said.contains(why), "{words:?}: {ended:?}");
    }
}

#[test]
fn who_wants_no_mail_starts_no_prog() {
    let stage = Stage::new(GREETING);
    let paper = stage.paper();
    let mut door = stage.open(&paper, &Start::USUAL);
    talk(&mut door, &[GREETS, EHLO, ("NOOP\r\nRSET\r\n", "250 NOOP\r\n250 RSET\r\n"), QUIT]);
    assert_eq!(door.client.as_mut().unwrap().get_end(), Ok(End::Clean));
    assert_eq!(door.code(), 0, "{}", door.said());
    assert!(stage.lines("started").is_empty());
    assert!(door.said().contains("mode=plain"), "{}", door.said());

    let mut door = stage.open(&paper, &Start::USUAL);
    talk(&mut door, &[GREETS]);
    door.client.take().unwrap().end();
    assert_eq!(door.code(), 1, "{}", door.said());
    assert!(stage.lines("started").is_empty());
}

#[test]
fn who_sends_mail_is_heard_by_prog_itself() {
    let stage = Stage::new(GREETING);
    let mut door = stage.open(&stage.paper(), &Start::USUAL);
    talk(&mut door, &[GREETS, EHLO, ("MAIL FROM:<a@b>\r\n", "250 MAIL FROM:<a@b>\r\n"), QUIT]);
    assert_eq!(door.client.as_mut().unwrap().get_end(), Ok(End::Clean));
    assert_eq!(door.code(), 0, "{}", door.said());
    assert_eq!(stage.lines("started"), ["127.0.0.1"]);
    assert_eq!(stage.lines("heard"), ["EHLO c.example", "MAIL FROM:<a@b>", "QUIT"]);
}

#[test]
fn starttls_starts_no_prog_but_where_it_goes_on_behind() {
    let stage = Stage::new(GREETING);
    let paper = stage.paper();
    let mut door = stage.open(&paper, &Start::USUAL);
    door.backend.listen();
    talk(&mut door, &[GREETS, EHLO]);
    door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
    door.backend.wire().unwrap().send(b"220 b\r\n");
    door.backend.wire().unwrap().get(b"EHLO c.example\r\n").unwrap();
    door.backend.wire().unwrap().send(b"250 b\r\n");
    talk(&mut door, &[("", "220 2.0.0 Ready to start TLS\r\n")]);
    door.client.as_mut().unwrap().secure(tls_client()).unwrap();
    assert!(stage.lines("started").is_empty());

    let inside = ("EHLO c\r\n", "250-mx hello c [127.0.0.1]\r\n250 SIZE 9\r\n");
    let ways = [Way::Keep, Way::Respawn, Way::UcspiTls, Way::UcspiRespawn];
    for way in ways {
        let mut door = stage.open(&paper, &Start::by(way));
        talk(&mut door, &[GREETS, EHLO, ("STARTTLS\r\n", "220 2.0.0 Ready to start TLS\r\n")]);
        door.client.as_mut().unwrap().secure(tls_client()).unwrap();
        talk(&mut door, &[inside, QUIT]);
        door.client.take().unwrap().end();
        assert_eq!(door.code(), 0, "{}", door.said());
    }
    assert_eq!(stage.lines("started").len(), ways.len(), "one for each");
}

#[test]
fn a_prog_that_is_not_what_the_file_says_is_421_and_the_log_says_to_probe() {
    for greeting in ["printf '554 no\\r\\n'", "exit"] {
        let stage = Stage::new(GREETING);
        let paper = stage.paper();
        stage.greets(greeting);
        let mut door = stage.open(&paper, &Start::USUAL);
        talk(&mut door, &[GREETS, EHLO]);
        door.client.as_mut().unwrap().send(b"MAIL FROM:<a@b>\r\n");
        door.client.as_mut().unwrap().get(b"421 4.3.0 ").unwrap();
        assert_eq!(door.code(), 111, "{}", door.said());
        let told = format!("{paper} is not what PROG says: run starttls-wrapper --probe again");
        assert!(door.said().contains(&told), "{}", door.said());
    }
}

/// The process that waits to become PROG.
fn holder(door: &Door) -> Pid {
    let pid = door.pid().as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    Pid::from_raw(children.trim().parse().unwrap()).unwrap()
}

#[test]
fn a_process_that_waits_and_is_killed_costs_only_who_needs_it() {
    let stage = Stage::new(GREETING);
    let paper = stage.paper();
    for (line, reply, code) in [("MAIL FROM:<a@b>\r\n", "421 4.3.0 ", 111), ("QUIT\r\n", "221 bye\r\n", 0)] {
        let mut door = stage.open(&paper, &Start::USUAL);
        talk(&mut door, &[GREETS, EHLO]);
        kill_process(holder(&door), Signal::KILL).unwrap();
        talk(&mut door, &[(line, reply)]);
        assert_eq!(door.code(), code, "{}", door.said());
    }
}

#[test]
fn a_bad_file_has_prog_started_at_once() {
    let stage = Stage::new(GREETING);
    for (text, why) in [
        (None, "can't read it: No such file"),
        (Some(""), "no greeting"),
        (Some("greeting 554 no\n"), "greeting: not one whole reply of code 220"),
        (Some("greeting 220 mx\nmail 250 ok\n"), "line 2: neither greeting nor a command"),
    ] {
        let path = stage.path("bad");
        text.iter().for_each(|text| fs::write(&path, text).unwrap());
        let mut door = stage.open(path.to_str().unwrap(), &Start::USUAL);
        talk(&mut door, &[GREETS, EHLO, QUIT]);
        assert_eq!(door.code(), 0);
        let warning = format!("PROG is started at once: greeting {}: {why}", path.display());
        assert!(door.said().contains(&warning), "{}", door.said());
    }
    assert_eq!(stage.lines("started").len(), 4);
}

#[test]
fn prog_has_all_that_it_would_have_had_at_once() {
    let folder = TempDir::new().unwrap();
    let paper = folder.path().join("paper");
    fs::write(&paper, "greeting 220 p\nehlo 250 p\n").unwrap();
    let lazy = ["--greeting", paper.to_str().unwrap()];
    let environment = [("CERTFILE", "/x"), ("RELAYCLIENT", ""), ("LANG", "C")];
    let report = |options: &[&str]| -> Report {
        let mut door = Door::open(&Start { options, environment: &environment, ..Start::USUAL });
        if !options.is_empty() {
            talk(&mut door, &[("", "220 p\r\n"), ("EHLO c\r\n", "250-p\r\n250 STARTTLS\r\n")]);
            door.client.as_mut().unwrap().send(b"MAIL FROM:<a@b>\r\n");
        }
        let mut child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{why}: {}", door.said()));
        if !options.is_empty() {
            child.send(b"220 p\r\n");
            child.get(b"EHLO c\r\n").unwrap();
            child.send(b"250 p\r\n");
            child.get(b"MAIL FROM:<a@b>\r\n").unwrap();
        }
        door.client.take().unwrap().end();
        child.get_end().unwrap();
        child.exit(0);
        door.code();
        assert!(wait_until(PATIENCE, || child.is_gone(std::time::Duration::ZERO)));
        child.report
    };
    let (now, later) = (report(&[]), report(&lazy));
    let sorted = |report: &Report| {
        let mut all = report.environment.clone();
        all.retain(|variable| !variable.starts_with("TCPREMOTEPORT="));
        all.sort();
        all
    };
    assert_eq!(sorted(&now), sorted(&later));
    assert_eq!((now.fds, now.signals, now.folder), (later.fds, later.signals, later.folder));
}
