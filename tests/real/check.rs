//! `--check` between real servers: an open relay is found where there is one and not where there is none, the table says what a
//! session would meet, and no letter is ever sent.

use std::ffi::OsString;
use std::fs;
use std::process::Command;

use crate::backends::{stunnel_before, tlswrapper};
use crate::front::{Identity, MAILFRONT, wrapper, wrapper_by};
use crate::jail;
use crate::letter::Queue;
use crate::readme::block_behind;
use crate::stage::{Stage, needs_root};
use crate::table::Table;

/// A mailfront that takes no mail for example.com.
const CAUTIOUS: [&str; 5] = ["mailfront", "smtp", "queuedir", "mailrules", "accept"];

/// The environment of [`CAUTIOUS`].
fn environment(stage: &Stage, queue: &Queue) -> [(&'static str, OsString); 3] {
    let rules = stage.write("mailrules", "d*:*@example.com:Relaying denied\n");
    [("MAILRULES", rules.into()), ("QUEUEDIR", queue.folder().into()), ("TCPLOCALHOST", "mx.example.org".into())]
}

/// The command line, with `--check` before everything else.
fn checked(stage: &Stage, argv: Vec<OsString>) -> Command {
    let mut argv = argv;
    argv.insert(1, "--check".into());
    let log = fs::File::options().append(true).create(true).open(stage.path("check.log")).expect("a log");
    stage.shows(stage.path("check.log"));
    let mut command = stage.command(argv);
    command.stderr(log);
    command
}

/// What it says of a way to this server; that PROG is no open relay, and that its queue stays empty.
#[track_caller]
fn check(stage: &Stage, identity: &Identity, way: &str, options: &[&str], server: &[String]) -> Table {
    let queue = Queue::new(stage, &format!("child{}", stage.unused_port().port()));
    let mut argv = wrapper_by(identity, way, &[], &[]);
    argv.extend(options.iter().map(OsString::from));
    argv.extend(server.iter().map(OsString::from));
    argv.extend(CAUTIOUS.map(OsString::from));
    let table = Table::of(checked(stage, argv).envs(environment(stage, &queue)));
    table.has("ok", "PROG greets", "\"220 mx.example.org mailfront ESMTP\"");
    table.has("ok", "PROG: open relay", "not for the outside client 192.0.2.25: \"553 Relaying denied\"");
    table.has("ok", "PROG ends", "on QUIT: \"221 2.0.0 Good bye.\"");
    queue.is_empty();
    table
}

fn words(at: std::net::SocketAddrV4) -> [String; 2] {
    [at.ip().to_string(), at.port().to_string()]
}

const TRUST: &str =
    "mynetworks = 127.0.0.0/8\nsmtpd_relay_restrictions = permit_mynetworks reject_unauth_destination\n";

/// What is checked, what Postfix's main.cf has besides, and what the table then says of relaying.
struct Case {
    options: &'static [&'static str],
    main: &'static str,
    verdict: &'static str,
    found: &'static str,
}

#[test]
fn postfix_is_an_open_relay_where_it_trusts_loopback_unless_it_is_told_of_the_client_or_of_us() {
    const DENIED: &str = "\"554 5.7.1 <starttls-wrapper-check@example.com>: Relay access denied\"";
    const HEADER: &str = "smtpd_upstream_proxy_protocol = haproxy\n";
    let cases = [
        Case { options: &[], main: "", verdict: "problem", found: "this host (as each client) may mail to " },
        Case {
            options: &["--send-proxy", "v1"],
            main: HEADER,
            verdict: "ok",
            found: "not for the outside client 192.0.2.25: ",
        },
        Case {
            options: &["--send-proxy", "v2"],
            main: HEADER,
            verdict: "ok",
            found: "not for the outside client 192.0.2.25: ",
        },
        Case {
            options: &["--send-proxy", "v2", "--proxy-facts", "late"],
            main: HEADER,
            verdict: "ok",
            found: "not for the outside client 192.0.2.25: ",
        },
        Case {
            options: &["--backend-source", "127.0.0.53"],
            main: "mynetworks = !127.0.0.53, 127.0.0.0/8\n",
            verdict: "ok",
            found: "not for 127.0.0.53 (as each client): ",
        },
    ];
    for case in cases {
        let stage = Stage::new();
        let identity = Identity::self_signed(&stage, "own");
        let (at, maildir) = jail::postfix_with(&stage, &identity, "TLSv1.3", &format!("{TRUST}{}", case.main));
        let table = check(&stage, &identity, "tls", case.options, &words(at));
        table.has("ok", "HOST's TLS", "TLSv1.3 TLS_AES_128_GCM_SHA256, by our own certificate");
        table.has("ok", "HOST greets", "\"220 postfix.example ESMTP Postfix");
        table.has("ok", "HOST takes EHLO", "PIPELINING, ");
        table.has(case.verdict, "HOST: open relay", case.found);
        if case.verdict == "ok" {
            assert!(table.row("HOST: open relay").found.ends_with(DENIED), "{}", table.text);
        }
        if case.main == HEADER {
            table.has("ok", "HOST: local client", "127.0.0.1 in the header may relay: \"250 2.1.5 Ok\"");
        }
        let log = fs::read_to_string(stage.path("postfix/mail.log")).expect("mail.log");
        assert!(!log.contains("message-id=") && !maildir.exists(), "a letter was sent: {log}");
    }
}

#[test]
fn a_header_that_only_one_side_knows_of_is_a_problem() {
    for (options, main) in [(&["--send-proxy", "v1"][..], ""), (&[], "smtpd_upstream_proxy_protocol = haproxy\n")] {
        let stage = Stage::new();
        let identity = Identity::self_signed(&stage, "own");
        let (at, _) = jail::postfix_with(&stage, &identity, "TLSv1.3", main);
        let table = check(&stage, &identity, "tls", options, &words(at));
        table.has("problem", "HOST's TLS", "");
        table.has("untried", "HOST: open relay", "");
    }
}

#[test]
fn postfix_that_lets_us_say_who_the_client_is_is_a_problem() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let (at, _) = jail::postfix_with(&stage, &identity, "TLSv1.3", "smtpd_authorized_xclient_hosts = 127.0.0.0/8\n");
    let table = check(&stage, &identity, "tls", &[], &words(at));
    table.has("problem", "HOST's XCLIENT", "it offers XCLIENT to what comes through us");
    table.has("ok", "HOST: open relay", "not for this host");
}

#[test]
fn exim_is_an_open_relay_where_it_trusts_loopback_unless_it_is_told_of_the_client() {
    let rcpt = "accept hosts = 127.0.0.0/8\n  accept domains = localhost\n  deny message = relay not permitted";
    for (options, main, verdict) in
        [(&[][..], "", "problem"), (&["--send-proxy", "v2"], "hosts_proxy = 127.0.0.0/8\n", "ok")]
    {
        let stage = Stage::new();
        let identity = Identity::self_signed(&stage, "own");
        let (at, maildir) = jail::exim_with(&stage, &identity, "NORMAL:-VERS-ALL:+VERS-TLS1.3", main, rcpt);
        let table = check(&stage, &identity, "tls", options, &words(at));
        table.has("ok", "HOST greets", "\"220 exim.example ESMTP Exim");
        table.has(
            verdict,
            "HOST: open relay",
            if verdict == "ok" { "not for the outside client" } else { "this host" },
        );
        assert!(!maildir.exists(), "a letter was sent");
    }
}

/// It answers a second EHLO with 503, so that one of ours is one too many.
#[test]
fn opensmtpd_is_found_to_take_one_ehlo_only() {
    let stage = Stage::new();
    let (identity, unused) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "unused"));
    let (server, _) = jail::opensmtpd(&stage);
    let at = stunnel_before(&stage, &identity, "TLSv1.3", &format!("connect = {server}"), &unused);
    let table = check(&stage, &identity, "tls", &[], &words(at));
    table.has("problem", "HOST takes EHLO", "\"503");
    assert!(table.row("HOST takes EHLO").advice.contains("--replay none"), "{}", table.text);
    let table = check(&stage, &identity, "tls", &["--replay", "none"], &words(at));
    table.has("ok", "HOST takes EHLO", "");
}

#[test]
fn the_other_ways() {
    let stage = Stage::new();
    let (identity, queue) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "backend"));
    let table = check(&stage, &identity, "keep", &[], &[]);
    table.has("ok", "PROG is kept", "it takes RSET, and EHLO a second time");
    assert_eq!(table.code, Some(0), "{}", table.text);
    let table = check(&stage, &identity, "respawn", &[], &[]);
    table.has("ok", "fresh PROG", "it starts with SSL_* set, and takes what is replayed");
    assert_eq!(table.code, Some(0), "{}", table.text);
    let table = check(&stage, &identity, "ucspi-tls", &[], &[]);
    table.has("untried", "TLS", "it is the UCSPI-TLS server's");
    table.has("ok", "PROG is kept", "it takes RSET, and EHLO a second time");

    let muted = [env!("CARGO_BIN_EXE_starttls-wrapper"), "--mute=always", "mailfront", "smtp", "queuedir", "accept"];
    let server = format!("exec = {}\nexecArgs = {}", muted[0], muted.join(" "));
    let table =
        check(&stage, &identity, "raw", &[], &words(stunnel_before(&stage, &identity, "TLSv1.3", &server, &queue)));
    table.has(
        "ok",
        "HOST's TLS",
        "TLSv1.3 TLS_AES_128_GCM_SHA256, whose certificate is for clients to judge: localhost, 127.",
    );
    table.has("ok", "HOST is muted", "no greeting inside TLS");
    table.has("problem", "HOST: open relay", "this host (as each client) may mail to ");
    let table = check(&stage, &identity, "raw", &[], &words(tlswrapper(&stage, &identity, &MAILFRONT, &queue)));
    table.has("ok", "HOST's TLS", "TLSv1.2 ");
    table.has("problem", "HOST is muted", "it greets inside TLS: \"220 front.example mailfront ESMTP\"");
    queue.is_empty();
}

/// Root reads the key, which nobody else may; HOST is heard as somebody else.
#[test]
fn ids_are_those_of_a_session() {
    needs_root();
    let stage = Stage::new();
    let (identity, queue) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "backend"));
    let at = stunnel_before(
        &stage,
        &identity,
        "TLSv1.3",
        "exec = /usr/sbin/mailfront\nexecArgs = mailfront smtp queuedir accept",
        &queue,
    );
    let ids = [("TLS_UID", "64022"), ("TLS_GID", "64022")];
    let argv = wrapper(&identity, &[], at, &CAUTIOUS);
    let table = Table::of(checked(&stage, argv.clone()).envs(environment(&stage, &queue)).envs(ids));
    table.has("ok", "ids", "PROG ran and the key was read as uid 0; then TLS_UID=64022, TLS_GID=64022");
    table.has("ok", "sandbox", "what follows was tried inside it");
    table.has("ok", "HOST greets", "\"220 ");

    let mut unprivileged = checked(&stage, argv);
    std::os::unix::process::CommandExt::uid(&mut unprivileged, 64021);
    let table = Table::of(unprivileged.envs(environment(&stage, &queue)).envs(ids));
    table.has("problem", "certificate", "can't read ");
    table.has(
        "problem",
        "ids",
        "uid 64021 can't drop its privileges (TLS_UID=64022, TLS_GID=64022): Operation not permitted",
    );
}

/// Colours are for people: on a terminal, unless they want none.
#[test]
fn there_are_colours_on_a_terminal_unless_no_color_is_set() {
    let stage = Stage::new();
    let on_a_terminal = |no_color: Option<&str>| {
        let pty = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";
        let mut command = stage.command(["/usr/bin/python3", "-I", "-c", pty]);
        command.args([env!("CARGO_BIN_EXE_starttls-wrapper"), "--check", "--way", "keep", "/no/such/prog"]);
        let done = stage.run(command.envs(no_color.map(|value| ("NO_COLOR", value))), b"");
        assert_eq!(done.status.code(), Some(1), "{}", done.output);
        done.output
    };
    let row = "  PROG greets           it can't be started";
    assert!(on_a_terminal(None).contains(&format!("\x1b[31mproblem\x1b[0m{row}")), "{}", on_a_terminal(None));
    assert!(on_a_terminal(Some("")).contains("\x1b[31m"));
    let plain = on_a_terminal(Some("1"));
    assert!(plain.contains(&format!("problem{row}")) && !plain.contains('\x1b'), "{plain}");
}

/// The example of README.md: its command, with our paths in it, prints its table.
#[test]
fn the_example_of_the_readme_is_what_it_prints() {
    let stage = Stage::new();
    let authority = Identity::self_signed(&stage, "authority");
    let identity = Identity::signed(&stage, "mx", "mx.example.org", &authority);
    let both = [&identity.certificate, &identity.key].map(|file| fs::read(file).expect("PEM")).concat();
    let both = stage.write("mx.pem", both).display().to_string();
    let (at, _) = jail::postfix_with(&stage, &identity, "TLSv1.3", &format!("{TRUST}myhostname = mx.example.org\n"));
    let queue = Queue::new(&stage, "child");

    let (line, expected) = block_behind("### Trying it: `--check`").split_once('\n').expect("a command and a table");
    let ours =
        [("/etc/ssl/mx.pem", both.as_str()), ("127.0.0.1", &at.ip().to_string()), ("465", &at.port().to_string())];
    let line = crate::readme::with(line.strip_prefix("$ ").expect("a command"), &ours);
    let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
    assert_eq!(argv[..2], ["starttls-wrapper", "--check"]);
    let argv = [&[env!("CARGO_BIN_EXE_starttls-wrapper").into()], &argv[2..]].concat();
    let mut command = checked(&stage, argv);
    let table = Table::of(command.envs(environment(&stage, &queue)).env("SSL_CERT_FILE", &authority.certificate));

    // The certificate's end is not the example's.
    let days = |text: &str| text.lines().find(|line| line.contains("days left")).map(str::to_owned).expect("days left");
    let (ours, theirs) = (days(&table.text), days(expected));
    assert!(ours.starts_with("warning  days left             1, until 20"), "{ours}");
    let shown =
        table.text.replace(&both, "/etc/ssl/mx.pem").replace(&at.to_string(), "127.0.0.1:465").replace(&ours, &theirs);
    assert_eq!(shown, expected, "README.md has another table than\n{shown}");
}
