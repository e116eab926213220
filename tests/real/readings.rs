//! The models of tests/differential held against the servers that they are models of: what one of those runs, its model says it runs.
//! And the snooper before the servers themselves: nothing guarded is a command to them before the cutoff.
//!
//! A server's reply tells whether it ran a line. Each is set to be as lenient as it can be. Debian has no qmail-smtpd: one that was built
//! by hand is tried by `QMAIL_SMTPD=FILE cargo test --test real -- --ignored qmail`.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::front::Identity;
use crate::jail;
use crate::models::{self, GUARDED, Model, knows};
use crate::snoop::{Setting, play};
use crate::stage::{PATIENCE, Stage};
use crate::stream::Stream;
use crate::streams::Random;

/// Lines that a server gets, each in a session of its own; and streams, through the snooper. As often as `$TIMES` says.
fn lines_and_streams() -> (usize, usize) {
    let times = std::env::var("TIMES").map_or(1, |text| text.parse().expect("TIMES: not a number"));
    (1000 * times, 300 * times)
}

/// What a line was to a server. The lesser is the less dangerous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ran {
    Nothing,
    Harmless,
    Guarded,
}

/// A server, as its replies show it.
struct Server<'a> {
    model: Model,
    connect: &'a dyn Fn() -> Connection,
    /// How its replies begin, each with a mark before it: what they show. `-`: it has run nothing; `.`: something harmless; `!`: something
    /// guarded. `NOOP`, or `RSET|QUIT`: so it answers these and something guarded too, which it has run where a line has more such replies
    /// than such names in it.
    replies: &'a str,
    /// The guarded commands that it has, as it knows them.
    has: &'a [&'a str],
}

impl Server<'_> {
    /// What it has run of a line, by all its replies: the most that any of them shows.
    fn ran(&self, line: &[u8], replies: &[String]) -> Ran {
        let marks: Vec<_> = replies.iter().map(|reply| self.mark(line, reply)).collect();
        let such_names = |names: &str| {
            let is_one = |part: &&[u8]| names.split('|').any(|name| part.eq_ignore_ascii_case(name.as_bytes()));
            line.windows(4).filter(is_one).count()
        };
        let shown = |mark: &&str| match *mark {
            "-" => Ran::Nothing,
            "." => Ran::Harmless,
            "!" => Ran::Guarded,
            names if marks.iter().filter(|mark| *mark == &names).count() > such_names(names) => Ran::Guarded,
            _ => Ran::Harmless,
        };
        marks.iter().map(shown).max().unwrap_or(Ran::Nothing)
    }

    fn mark(&self, line: &[u8], reply: &str) -> &str {
        let mut marks = self.replies.lines().filter_map(|entry| entry.trim_start().split_once(' '));
        let mark = marks.find(|(_, text)| reply.starts_with(text)).map(|(mark, _)| mark);
        mark.unwrap_or_else(|| panic!("what does \"{}\" say of \"{}\"?", reply.escape_debug(), line.escape_ascii()))
    }
}

/// One connection, the greeting read.
struct Connection {
    stream: Stream,
    unread: Vec<u8>,
    child: Option<Child>,
}

impl Connection {
    fn to(at: SocketAddrV4) -> Self {
        Self::over(Stream::socket(TcpStream::connect(at).unwrap()), None)
    }

    fn with(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self::over(Stream::pipes(output.into(), input.into()), Some(child))
    }

    fn over(mut stream: Stream, child: Option<Child>) -> Self {
        stream.deadline = Some(Instant::now() + PATIENCE);
        let mut new = Self { stream, unread: Vec::new(), child };
        let greeting = new.reply().unwrap();
        assert!(greeting.starts_with("220"), "{greeting}");
        new
    }

    /// The next reply, all its lines; `None`: it has closed.
    fn reply(&mut self) -> Option<String> {
        loop {
            let mut at = 0;
            for line in self.unread.split_inclusive(|octet| *octet == b'\n') {
                at += line.len();
                if line.ends_with(b"\n") && line.get(3) != Some(&b'-') {
                    return Some(String::from_utf8_lossy(&self.unread.drain(..at).collect::<Vec<_>>()).into_owned());
                }
            }
            let mut octets = [0; 4096];
            match self.stream.read(&mut octets) {
                Ok(length @ 1..) => self.unread.extend_from_slice(&octets[..length]),
                Err(error) if error.kind() == ErrorKind::TimedOut => panic!("no reply in {PATIENCE:?}"),
                _ => return None,
            }
        }
    }

    /// What it says when our side has ended, till it closes.
    fn rest(&mut self) -> String {
        self.stream.end();
        let mut rest = std::mem::take(&mut self.unread);
        if self.stream.read_to_end(&mut rest).is_err_and(|error| error.kind() == ErrorKind::TimedOut) {
            panic!("it has not closed in {PATIENCE:?}");
        }
        String::from_utf8_lossy(&rest).into_owned()
    }

    /// Its reply to a line.
    fn ask(&mut self, line: &[u8]) -> Option<String> {
        self.stream.write_all(line).ok()?;
        self.reply()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.stream.end();
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What the model makes of a line.
fn predicted(model: Model, line: &[u8]) -> Ran {
    let is = |test: &dyn Fn(&[u8]) -> bool| model(line).iter().any(|command| test(&command.verb));
    match () {
        () if is(&|verb| GUARDED.contains(&verb)) => Ran::Guarded,
        () if is(&knows) => Ran::Harmless,
        () => Ran::Nothing,
    }
}

/// What the server makes of it: the most that any reply shows till it closes, since it may read one line as several.
fn done(server: &Server<'_>, line: &[u8], greets: bool) -> Ran {
    let mut connection = (server.connect)();
    if greets {
        let reply = connection.ask(b"EHLO client.example\r\n").unwrap();
        assert!(reply.starts_with("250"), "{reply}");
    }
    // It may have closed at what went before.
    let _ = connection.stream.write_all(line);
    connection.stream.end();
    let mut replies = Vec::new();
    while let Some(reply) = connection.reply() {
        replies.push(reply);
        if replies.last().is_some_and(|reply| reply.starts_with("220")) {
            break; // TLS
        }
    }
    server.ran(line, &replies)
}

/// What servers have been seen to read each in their own way (security.md 2.2).
const ODD: [&[u8]; 19] = [
    b"NOOP\n",
    b"NOOP\r\r\n",
    b" NOOP\r\n",
    b"\tNOOP\r\n",
    b"NOOP\tx\r\n",
    b"NOOP\x0bx\r\n",
    b"NOOP\0x\r\n",
    b"\"NOOP\"\r\n",
    b"\"NO\"OP\r\n",
    b"NO\\OP\r\n",
    b"MAIL\0FROM:<a@b.example>\r\n",
    b"MAIL\tFROM:<a@b.example>\r\n",
    b"MAIL\rFROM:<a@b.example>\r\n",
    b"NOOP\rMAIL FROM:<a@b.example>\r\n",
    b"NOOP x\rMAIL FROM:<a@b.example>\r\n",
    b"RSET\rMAIL FROM:<a@b.example>\r\n",
    b"\"MAIL\" FROM:<a@b.example>\r\n",
    b"MAIL FROM:<a@b.example>\r",
    b"MAIL FROM:<a@b.example>",
];

/// Those, and lines that have a command right behind where a server may cut them: Postfix, a buffer of many, and Exim.
fn odd() -> impl Iterator<Item = Vec<u8>> {
    let cut = |at| [&vec![b'a'; at][..], b"MAIL FROM:<a@b.example>\r\n"].concat();
    ODD.into_iter().map(<[u8]>::to_vec).chain([2048, 4096, 16_385].map(cut))
}

fn lines_are_read_as_by_the_model(server: &Server<'_>) {
    let lines = |seed| {
        let mut random = Random::new(seed);
        let stream = random.stream();
        let lines = stream.split_inclusive(|octet| *octet == b'\n');
        lines.map(|line| (line.to_vec(), random.one_in(2))).collect::<Vec<_>>()
    };
    let (number, _) = lines_and_streams();
    let (mut guarded, mut harmless, mut stricter) = (0, 0, 0);
    let odd = odd().map(|line| (line, true));
    for (line, greets) in odd.chain((1..).flat_map(lines)).take(number) {
        let (predicted, done) = (predicted(server.model, &line), done(server, &line, greets));
        let shown = line.escape_ascii();
        assert!(done <= predicted, "\"{shown}\" (EHLO before: {greets}): {done:?}, and by the model {predicted:?}");
        guarded += usize::from(done == Ran::Guarded);
        harmless += usize::from(done == Ran::Harmless);
        stricter += usize::from(done < predicted);
    }
    println!("{number} lines: {guarded} guarded, {harmless} harmless commands, {stricter} less than the model says");
    assert!(guarded * 50 > number && harmless * 20 > number, "the lines are too tame, or the replies not understood");
    assert!(stricter * 10 < number, "the model is no model of it");
    for command in server.has {
        let line = format!("{command}\r\n");
        assert_eq!(done(server, line.as_bytes(), true), Ran::Guarded, "{command}");
    }
}

fn nothing_guarded_reaches_it_as_a_command(server: &Server<'_>) {
    let (_, number) = lines_and_streams();
    let (mut asked, mut relayed) = (0, 0);
    for seed in 1..=number as u64 {
        let mut random = Random::new(seed);
        let stream = random.stream();
        let mut setting = Setting::of([[0, 0, 16, 4][random.below(4)], [255, 3, 60][random.below(3)]]);
        setting.piece = setting.piece.max(stream.len() / 100);
        let mut connection = (server.connect)();
        let (shown, mut said_bye) = (stream.escape_ascii(), false);
        let mut answer = |line: &[u8], _| {
            asked += 1;
            let said = line.escape_ascii();
            let reply = connection.ask(&[line, b"\r\n"].concat());
            let Some(reply) = reply else {
                assert!(said_bye, "seed {seed}: no reply to \"{said}\" of \"{shown}\"");
                return "421 closed\r\n".to_owned();
            };
            said_bye |= reply.starts_with("221");
            let more = connection.unread.escape_ascii();
            assert!(connection.unread.is_empty(), "seed {seed}: \"{said}\" of \"{shown}\": {reply} and \"{more}\"");
            let ran = server.ran(line, std::slice::from_ref(&reply));
            assert!(ran < Ran::Guarded, "seed {seed}: \"{said}\" of \"{shown}\": {reply}");
            reply
        };
        relayed += usize::from(play(&stream, &setting, &mut answer).relayed);
        // A second reply that came late was taken for the next line's: then one is left.
        let left = connection.rest();
        let closes = left.is_empty() || left.starts_with("421") && left.lines().count() == 1;
        assert!(closes, "seed {seed}: \"{shown}\": \"{}\" after all replies", left.escape_debug());
    }
    println!("{number} streams: {asked} commands before the cutoff, {relayed} relayed");
    assert!(asked > number && relayed * 5 > number);
}

fn is_held(server: &Server<'_>) {
    lines_are_read_as_by_the_model(server);
    nothing_guarded_reaches_it_as_a_command(server);
}

#[test]
fn postfix_is_no_more_lenient_than_its_model() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let lenient = "smtpd_tls_wrappermode = no\nsmtpd_tls_security_level = none\nsmtpd_error_sleep_time = 0\nsmtpd_soft_error_limit = 1000\n\
        smtpd_hard_error_limit = 1000\nsmtpd_junk_command_limit = 1000\nsmtpd_discard_ehlo_keywords = chunking\nsmtpd_forbidden_commands =\n\
        smtpd_client_connection_count_limit = 0\n";
    let (at, _) = jail::postfix_with(&stage, &identity, "TLSv1.3", lenient);
    is_held(&Server {
        model: models::postfix,
        connect: &|| Connection::to(at),
        replies: "- 500 5.5.2 Error: command not recognized
            - 500 5.5.2 Error: bad
            - 221 2.7.0 Error: I can break rules
            . 250-postfix.example
            . 250 postfix.example
            . 250 2.0.0 Ok
            . 221 2.0.0 Bye
            . 501 Syntax: EHLO
            . 501 Syntax: HELO
            . 501 5.5.4 Syntax: RSET
            . 501 5.5.4 Syntax: VRFY
            . 501 5.1.3 Bad recipient
            . 252 2.0.0
            . 554 5.7.1
            ! 250 2.1.0 Ok
            ! 501 5.5.4 Syntax: MAIL
            ! 555 5.5.4
            ! 501 5.1.7
            ! 503 5.5.1 Error: need MAIL
            ! 503 5.5.1 Error: need RCPT
            ! 521 5.5.1 Error: command not implemented
            ! 502 5.5.1 Error: command not implemented
            ! 501 5.5.4 Syntax: STARTTLS
            ! 503 5.5.1 Error: authentication not enabled
            ! 459
            ! 500 Syntax: ETRN
            ! 501 Error: invalid parameter
            ! 501 5.5.4 Syntax: X
            ! 550 5.7.0 Error: insufficient authorization",
        has: &[
            "MAIL FROM:<a@b.example>",
            "AUTH",
            "DATA",
            "BDAT",
            "STARTTLS",
            "RCPT TO:<a@b.example>",
            "ETRN a",
            "XCLIENT",
            "XFORWARD",
        ],
    });
}

#[test]
fn exim_is_no_more_lenient_than_its_model() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let lenient = "smtp_max_unknown_commands = 1000\nsmtp_max_synprot_errors = 1000\nsmtp_accept_max = 0\nsmtp_enforce_sync = false\nrecipient_unqualified_hosts = *\nsender_unqualified_hosts = *\n";
    let at = jail::exim_in_clear(&stage, &identity, lenient);
    is_held(&Server {
        model: models::exim,
        connect: &|| Connection::to(at),
        replies: "- 500 unrecognized command
            - 501 NUL characters are not allowed
            - 421 exim.example lost input connection
            . 250-exim.example
            . 250 exim.example
            . 250 Reset OK
            . 221 exim.example
            . 501 Syntactically invalid
            . 214-
            . 252
            . 550 Administrative
            . 501 empty address
            . 501 address is
            . 501 missing or malformed local part
            ! 503 AUTH
            ! 501 missing size
            ! 503 BDAT
            ! 503 valid RCPT
            ! 458
            ! 220 TLS
            ! 503 STARTTLS
            ! 503 sender
            ! 503 HELO or EHLO
            NOOP 250 OK
            RSET|QUIT 501 unexpected argument data",
        has: &["MAIL FROM:<a@b.example>", "AUTH", "DATA", "BDAT", "STARTTLS", "RCPT TO:<a@b.example>", "ETRN a"],
    });
}

#[test]
fn mailfront_is_no_more_lenient_than_its_model() {
    let stage = Stage::new();
    is_held(&Server {
        model: models::mailfront,
        connect: &|| Connection::with(&mut stage.command(["mailfront", "smtp", "echo", "accept"])),
        replies: "- 500 5.5.1 Not implemented.
            . 250-unknown
            . 250 unknown
            . 250 2.3.0 OK
            . 214
            . 221
            . 252
            ! 250 Sender=
            ! 501 5.5.2 Syntax error in address
            ! 503 5.5.1 You must send",
        has: &["MAIL FROM:<a@b.example>", "DATA", "RCPT TO:<a@b.example>"],
    });
}

#[test]
#[ignore = "Debian has no qmail-smtpd: QMAIL_SMTPD=FILE"]
fn qmail_is_no_more_lenient_than_its_model() {
    let stage = Stage::new();
    let program = std::env::var("QMAIL_SMTPD").expect("QMAIL_SMTPD=FILE");
    is_held(&Server {
        model: models::qmail,
        connect: &|| Connection::with(&mut stage.command([&program])),
        replies: "- 502 unimplemented
            . 250-qmail
            . 250 qmail
            . 250 flushed
            . 214
            . 221
            . 252
            NOOP 250 ok
            ! 503 MAIL first
            ! 503 RCPT first
            ! 555 syntax error",
        has: &["MAIL FROM:<a@b.example>", "DATA", "RCPT TO:<a@b.example>"],
    });
}
