//! Two listeners behind HAProxy, by the README's own configuration: clients keep their address, a front end that is killed takes no
//! sessions but its own with it, one that is told to stop lets them end, a ticket of one is good for the other, and HAProxy's health checks
//! start no PROG.

use std::cell::Cell;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::process::{Pid, Signal, kill_process};

use crate::backends::stunnel;
use crate::front::Identity;
use crate::letter::Queue;
use crate::readme::{block_behind, with};
use crate::stage::{PATIENCE, Stage, is_listening, wait_for};

/// PROG: it greets by the name that it is given, says whom it takes its client for, and writes down for whom it was started.
const PROG: &str = r#"#!/bin/sh
CR=$(printf '\r')
echo "$TCPREMOTEIP" >>"$0.started"
printf '220 %s\r\n' "$1"
while IFS= read -r line; do
    case ${line%"$CR"} in
        QUIT) printf '221 bye\r\n'; exit ;;
        MAIL*) printf '250 %s\r\n' "$TCPREMOTEIP" ;;
        *) printf '250 ok\r\n' ;;
    esac
done
"#;

/// A client and what it is connected to.
struct Client {
    stream: BufReader<TcpStream>,
    front: String,
}

impl Client {
    /// One from this address, once it is greeted. `Err`: it was not.
    fn from(source: &str, to: SocketAddrV4) -> Result<Self, std::io::Error> {
        // No server that is started later may hold it open.
        let stream = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        bind(&stream, &SocketAddr::new(source.parse().expect("an address"), 0))?;
        connect(&stream, &to)?;
        let stream = TcpStream::from(stream);
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self { stream: BufReader::new(stream), front: String::new() };
        let greeting = client.line()?;
        match greeting.strip_prefix("220 ") {
            Some(front) => client.front = front.to_owned(),
            None => return Err(std::io::Error::other(format!("greeted with {greeting:?}"))),
        }
        Ok(client)
    }

    fn line(&mut self) -> Result<String, std::io::Error> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    fn says(&mut self, line: &str) -> Result<String, std::io::Error> {
        write!(self.stream.get_mut(), "{line}\r\n")?;
        self.line()
    }
}

/// A front end, as the README starts it.
struct Front {
    name: &'static str,
    at: SocketAddrV4,
    starts: Cell<u32>,
}

impl Front {
    /// Returns its process.
    fn start(&self, stage: &Stage, host: SocketAddrV4) -> Pid {
        self.starts.set(self.starts.get() + 1);
        let name = format!("{}-{}", self.name, self.starts.get());
        let words = with(
            block_behind("On each, with its own address for 192.0.2.11:"),
            &[
                ("exec starttls-wrapper", concat!("exec ", env!("CARGO_BIN_EXE_starttls-wrapper"), " --workers 1")),
                ("/etc/ssl/ticket.keys", &stage.path("ticket.keys").to_string_lossy()),
                ("/etc/ssl/mx.pem", &stage.path("mx.pem").to_string_lossy()),
                ("192.0.2.11:25", &self.at.to_string()),
                // By which HAProxy reaches loopback.
                ("192.0.2.10", "127.0.0.1"),
                ("127.0.0.1 465", &format!("{} {}", host.ip(), host.port())),
                ("/var/qmail/bin/qmail-smtpd", &format!("/bin/sh {} {}", stage.path("prog").display(), self.name)),
            ],
        );
        let script = stage.write(&name, words);
        stage.start_until(&name, stage.command(["/bin/sh"]).arg(script), "serve", || {
            stage.log(&name).contains("listening on ")
        });
        stage.pid(&name)
    }
}

/// Sessions until one of each front end is there.
fn one_of_each(at: SocketAddrV4) -> [Client; 2] {
    let mut found = [None, None];
    wait_for("a session on each front end", || {
        let client = Client::from("127.0.0.2", at).ok()?;
        let number = usize::from(client.front == "mx2");
        found[number] = Some(client);
        found.iter().all(Option::is_some).then_some(())
    });
    found.map(|client| client.expect("a client"))
}

#[test]
fn two_front_ends_behind_haproxy_serve_as_one() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let text = |path| std::fs::read_to_string(path).expect("PEM");
    stage.write("mx.pem", text(&identity.certificate) + &text(&identity.key));
    stage.write("prog", PROG);
    let keys = format!("umask 077; openssl rand -base64 48 >{}", stage.path("ticket.keys").display());
    stage.run(&mut stage.command(["/bin/sh", "-c", &keys]), b"").succeeded("openssl rand");
    let host = stunnel(&stage, &identity, "TLSv1.3", &Queue::new(&stage, "backend"));
    let fronts = ["mx1", "mx2"].map(|name| Front { name, at: stage.unused_port(), starts: Cell::new(0) });
    let [first, second] = [0, 1].map(|number: usize| fronts[number].start(&stage, host));
    let at = stage.unused_port();
    let configuration = with(
        block_behind("`haproxy.cfg` on 192.0.2.10"),
        &[
            ("192.0.2.10:25", &at.to_string()),
            // It must have twice as many descriptors.
            ("maxconn 20000", "maxconn 100"),
            ("192.0.2.11:25", &fronts[0].at.to_string()),
            ("192.0.2.12:25", &fronts[1].at.to_string()),
        ],
    );
    let file = stage.write("haproxy.cfg", configuration);
    stage.start("haproxy", stage.command(["haproxy", "-db", "-f"]).arg(file), at);

    // Each client keeps its address, whichever front end it comes to.
    for source in ["127.0.0.2", "127.0.0.77"] {
        for mut client in [Client::from(source, at).expect("served"), Client::from(source, at).expect("served")] {
            assert_eq!(client.says("MAIL FROM:<a@b.example>").expect("a reply"), format!("250 {source}"));
        }
    }

    // A ticket of one is good for the other, and sessions go to each in turn.
    let is_reused = |flag: &str| {
        let mut command = stage.command(["openssl", "s_client", "-starttls", "smtp", "-ign_eof"]);
        command.args(["-verify_return_error", "-verify_hostname", "localhost", "-CAfile"]).arg(&identity.certificate);
        command.arg("-connect").arg(at.to_string()).arg(flag).arg(stage.path("session"));
        let output = stage.run(&mut command, b"EHLO c.example\r\nQUIT\r\n").succeeded("openssl s_client");
        assert!(output.contains("\n221 "), "{output}");
        output.contains("\nReused, TLS")
    };
    assert!(!is_reused("-sess_out"));
    assert!((0..4).all(|_| is_reused("-sess_in")));
    for name in ["mx1-1", "mx2-1"] {
        wait_for("a resumed session on each", || stage.log(name).contains(" resumed=yes ").then_some(()));
    }

    // One is killed.
    let [mut lost, mut kept] = one_of_each(at);
    assert_eq!(kept.says("MAIL FROM:<a@b.example>").expect("a reply"), "250 127.0.0.2");
    kill_process(first, Signal::KILL).expect("kill");
    assert_eq!(lost.says("NOOP").unwrap_or_default(), "", "its session is over");
    // Who is in its queue at that moment is lost with it.
    wait_for("the socket to go", || (!is_listening(fronts[0].at)).then_some(()));
    for _ in 0..10 {
        let mut client = Client::from("127.0.0.3", at).expect("nobody is refused");
        assert_eq!(client.front, "mx2");
        assert_eq!(client.says("NOOP").expect("a reply"), "250 ok");
        assert_eq!(kept.says("NOOP").expect("a reply"), "250 ok");
    }

    // It is back, and serves again by itself.
    fronts[0].start(&stage, host);
    drop((lost, kept));
    let [mut new, mut drained] = one_of_each(at);

    // The other is told to stop, and lets the session end.
    kill_process(second, Signal::TERM).expect("kill");
    let begin = Instant::now();
    wait_for("the drain", || (!is_listening(fronts[1].at)).then_some(()));
    for _ in 0..10 {
        assert_eq!(Client::from("127.0.0.3", at).expect("nobody is refused").front, "mx1");
        assert_eq!(drained.says("NOOP").expect("a reply"), "250 ok");
    }
    assert_eq!(drained.says("QUIT").expect("a reply"), "221 bye");
    assert_eq!(new.says("NOOP").expect("a reply"), "250 ok");
    assert_eq!(stage.wait_until_ended("mx2-1").code(), Some(0));
    assert!(begin.elapsed() < Duration::from_secs(30), "with its last session, and not with --drain");

    // HAProxy's checks, which come from loopback, were served, and PROG was started for none of them.
    let log = stage.log("mx2-1");
    let is_check = |line: &&str| line.contains("client=127.0.0.1:") && line.contains(r#" end="over" "#);
    assert!(log.lines().filter(is_check).count() > 0, "{log}");
    let started = std::fs::read_to_string(stage.path("prog.started")).expect("PROG was started");
    assert!(started.contains("127.0.0.2\n") && !started.contains("127.0.0.1\n"), "{started}");
}
