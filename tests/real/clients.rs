//! Real SMTP clients, each delivering in clear and through STARTTLS with TLS 1.2 and 1.3, verifying our certificate.

use std::net::SocketAddrV4;

use crate::front::{Front, Identity};
use crate::jail::Jail;
use crate::letter::{RECIPIENT, SENDER, letter, on_the_wire, pipelined_session, with_crlf};
use crate::stage::Stage;

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    Clear,
    Tls12,
    Tls13,
}

impl Mode {
    /// The version as most programs write it.
    fn version(self) -> &'static str {
        match self {
            Mode::Clear => "",
            Mode::Tls12 => "TLSv1.2",
            Mode::Tls13 => "TLSv1.3",
        }
    }

    /// GnuTLS' priority string that allows this version alone.
    fn priorities(self) -> &'static str {
        match self {
            Mode::Clear | Mode::Tls13 => "NORMAL:-VERS-ALL:+VERS-TLS1.3",
            Mode::Tls12 => "NORMAL:-VERS-ALL:+VERS-TLS1.2",
        }
    }
}

/// Sends a letter; fails unless the client was content and spoke the version asked for.
type Client = fn(&Stage, SocketAddrV4, Mode, &Identity, &[u8]);

#[track_caller]
fn delivers(client: Client, mode: Mode) {
    let front = Front::new(&[]);
    let letter = letter("interop");
    client(&front.stage, front.at, mode, &front.identity, &letter);
    front.delivered(mode != Mode::Clear, &letter);
}

#[track_caller]
fn swaks_with(stage: &Stage, at: SocketAddrV4, tls: &[&str], letter: &[u8]) -> String {
    // swaks puts CRLF and the final dot behind whatever it is given.
    let data = stage.write("letter.eml", letter.strip_suffix(b"\n").expect("a last line end"));
    let mut command =
        stage.command(["swaks", "--ehlo", "client.example", "--from", SENDER, "--to", RECIPIENT, "--suppress-data"]);
    command.arg("--server").arg(at.ip().to_string()).arg("--port").arg(at.port().to_string());
    command.arg("--data").arg(format!("@{}", data.display())).args(tls);
    stage.run(&mut command, b"").succeeded("swaks")
}

/// Takes TLS where it is offered and works, and goes on in clear where not.
#[track_caller]
pub(crate) fn swaks_if_tls(stage: &Stage, at: SocketAddrV4, letter: &[u8]) -> String {
    swaks_with(stage, at, &["--tls-optional"], letter)
}

#[track_caller]
pub(crate) fn swaks(stage: &Stage, at: SocketAddrV4, mode: Mode, identity: &Identity, letter: &[u8]) {
    if mode != Mode::Clear {
        swaks_by_tls(stage, at, mode, identity, letter);
        return;
    }
    let output = swaks_with(stage, at, &[], letter);
    assert!(!output.contains("TLS started"), "{output}");
    assert_eq!(output.matches("STARTTLS").count(), 1, "offered once:\n{output}");
}

/// What it says of the dialogue.
#[track_caller]
pub(crate) fn swaks_by_tls(stage: &Stage, at: SocketAddrV4, mode: Mode, identity: &Identity, letter: &[u8]) -> String {
    let output = swaks_in_tls(stage, at, &["--tls"], mode, identity, letter);
    assert_eq!(output.matches("STARTTLS").count(), 2, "offered once, before TLS only:\n{output}");
    output
}

/// The same by TLS from the first octet, 1.2.
#[track_caller]
pub(crate) fn swaks_by_implicit_tls(stage: &Stage, at: SocketAddrV4, identity: &Identity, letter: &[u8]) -> String {
    swaks_in_tls(stage, at, &["--tls-on-connect"], Mode::Tls12, identity, letter)
}

fn swaks_in_tls(
    stage: &Stage,
    at: SocketAddrV4,
    how: &[&str],
    mode: Mode,
    identity: &Identity,
    letter: &[u8],
) -> String {
    let ca = identity.certificate.to_string_lossy();
    let protocol = mode.version().to_lowercase().replace('.', "_");
    let options = ["--tls-protocol", &protocol, "--tls-verify", "--tls-ca-path", &ca, "--tls-sni", "localhost"];
    let output = swaks_with(stage, at, &[how, &options].concat(), letter);
    let started = format!("TLS started with cipher {}", mode.version());
    assert!(output.contains(&started), "{output}");
    output
}

/// Fails if anything is said inside TLS before the client speaks, or anything but HELO opens the gate there.
#[track_caller]
pub(crate) fn silent_tls(stage: &Stage, at: SocketAddrV4) {
    let mut command = stage.command(["/usr/bin/python3", "-I"]);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real/silent_tls.py"));
    command.arg(at.ip().to_string()).arg(at.port().to_string());
    stage.run(&mut command, b"").succeeded("silent_tls.py");
}

#[track_caller]
pub(crate) fn openssl(stage: &Stage, at: SocketAddrV4, mode: Mode, identity: &Identity, letter: &[u8]) {
    openssl_to(stage, &at.to_string(), mode, identity, letter);
}

#[track_caller]
pub(crate) fn openssl_to(stage: &Stage, at: &str, mode: Mode, identity: &Identity, letter: &[u8]) {
    let version = if mode == Mode::Tls12 { "-tls1_2" } else { "-tls1_3" };
    let mut command = stage.command([
        "openssl",
        "s_client",
        "-starttls",
        "smtp",
        "-brief",
        "-ign_eof",
        "-verify_return_error",
        version,
    ]);
    command.args(["-verify_hostname", "localhost", "-connect"]).arg(at).arg("-CAfile").arg(&identity.certificate);
    let output = stage.run(&mut command, &pipelined_session(letter)).succeeded("openssl s_client");
    assert!(output.contains(&format!("Protocol version: {}", mode.version())), "{output}");
    assert!(output.contains("\n221 "), "{output}");
}

/// What the client asks for and what it shows of itself changes nothing (security.md, cases 105 and 112); but what is no name at all
/// gets an alert.
#[test]
fn any_name_and_a_certificate_of_the_clients_are_served() {
    let front = Front::new(&[]);
    let label = "a".repeat(63);
    let longest = format!("{label}.{label}.{label}.{}", &label[2..]);
    let identity = [&front.identity.certificate, &front.identity.key].map(|file| file.display().to_string());
    let served = [
        ["-servername", "other.example"],
        ["-servername", "192.0.2.1"],
        ["-servername", "2001:db8::1"],
        ["-servername", longest.as_str()],
        ["-noservername", "-no_ticket"],
    ];
    let shows = ["-cert", &identity[0], "-key", &identity[1]];
    let talk = |options: &[&str]| {
        let mut command = front.stage.command(["openssl", "s_client", "-starttls", "smtp", "-ign_eof", "-connect"]);
        front.stage.run(command.arg(front.at.to_string()).args(options), b"EHLO c.example\r\nQUIT\r\n")
    };
    for options in served.iter().map(|options| &options[..]).chain([&shows[..]]) {
        let output = talk(options).succeeded("openssl s_client");
        assert!(output.contains("\n221 "), "{options:?}: {output}");
    }
    for name in ["a..example", &format!("{label}.{label}.{label}.{label}")] {
        let output = talk(&["-servername", name]).output;
        assert!(output.contains("SSL alert number 47") && !output.contains("\n221 "), "{name}: {output}");
    }
}

#[track_caller]
fn gnutls(stage: &Stage, at: SocketAddrV4, mode: Mode, identity: &Identity, letter: &[u8]) {
    let mut command = stage.command([
        "gnutls-cli",
        "--starttls-proto=smtp",
        "--verify-hostname=localhost",
        "--priority",
        mode.priorities(),
    ]);
    command
        .arg("--x509cafile")
        .arg(&identity.certificate)
        .arg("-p")
        .arg(at.port().to_string())
        .arg(at.ip().to_string());
    let output = stage.run(&mut command, &pipelined_session(letter)).succeeded("gnutls-cli");
    assert!(output.contains(&mode.version().replace("TLSv", "(TLS")), "{output}");
    assert!(output.contains("Handshake was completed"), "{output}");
}

#[track_caller]
pub(crate) fn curl(stage: &Stage, at: SocketAddrV4, mode: Mode, identity: &Identity, letter: &[u8]) {
    let data = stage.write("letter.eml", with_crlf(letter));
    let (port, version) = (at.port(), mode.version().trim_start_matches("TLSv"));
    let mut command = stage.command([
        "curl",
        "-v",
        "--silent",
        "--show-error",
        "--mail-from",
        SENDER,
        "--mail-rcpt",
        RECIPIENT,
        "--upload-file",
    ]);
    command.arg(data).arg(format!("smtp://localhost:{port}/client.example"));
    command.arg("--connect-to").arg(format!("localhost:{port}:{}:{port}", at.ip()));
    if mode != Mode::Clear {
        command.arg("--ssl-reqd").arg("--cacert").arg(&identity.certificate);
        command.arg(format!("--tlsv{version}")).arg("--tls-max").arg(version);
    }
    let output = stage.run(&mut command, b"").succeeded("curl");
    let connection = format!("SSL connection using {}", mode.version());
    assert_eq!(output.contains(&connection), mode != Mode::Clear, "{output}");
}

/// It sends no letter: it looks at what a Postfix client would see.
#[track_caller]
fn posttls_finger(stage: &Stage, at: SocketAddrV4, mode: Mode, identity: &Identity) {
    let jail = Jail::new(stage, "finger");
    jail.write("/test/main.cf", "compatibility_level = 3.6\ninet_protocols = ipv4\nsmtp_dns_support_level = disabled\nsmtp_host_lookup = native\n");
    std::fs::copy(jail.path("usr/share/postfix/dynamicmaps.cf"), jail.path("test/dynamicmaps.cf"))
        .expect("dynamicmaps.cf");
    jail.admit(identity, 0);
    let mut command =
        jail.command(&["/usr/sbin/posttls-finger", "-c", "-l", "secure", "-F", "/cert.pem", "-p", mode.version()]);
    command.env("MAIL_CONFIG", "/test").arg(format!("[{}]:{}", at.ip(), at.port())).arg("localhost");
    let output = stage.run(&mut command, b"").succeeded("posttls-finger");
    assert!(output.contains(&format!("Verified TLS connection established to {}", at.ip())), "{output}");
    assert!(output.contains(&format!(": {} with cipher", mode.version())), "{output}");
}

#[track_caller]
fn smtplib(stage: &Stage, at: SocketAddrV4, mode: Mode, identity: &Identity, letter: &[u8]) {
    let data = stage.write("letter.eml", with_crlf(letter));
    let mut command = stage.command(["/usr/bin/python3", "-I"]);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real/smtplib_client.py"));
    command.arg(at.ip().to_string()).arg(at.port().to_string()).arg(if mode == Mode::Clear {
        "clear"
    } else {
        mode.version()
    });
    command.arg(&identity.certificate).args([SENDER, RECIPIENT]).arg(data);
    stage.run(&mut command, b"").succeeded("smtplib");
}

#[track_caller]
fn msmtp(stage: &Stage, at: SocketAddrV4, mode: Mode, identity: &Identity, letter: &[u8]) {
    let mut command = stage.command(["msmtp", "--debug", "--domain=client.example", "--auth=off", "--timeout=30"]);
    command.arg(format!("--host={}", at.ip())).arg(format!("--port={}", at.port())).arg(format!("--from={SENDER}"));
    if mode == Mode::Clear {
        command.arg("--tls=off");
    } else {
        command.args(["--tls=on", "--tls-starttls=on"]).arg(format!("--tls-priorities={}", mode.priorities()));
        command.arg(format!("--tls-trust-file={}", identity.certificate.display()));
    }
    let output = stage.run(command.arg(RECIPIENT), letter).succeeded("msmtp");
    let version = mode.version().replace("TLSv", "(TLS");
    assert!(mode == Mode::Clear || output.contains(&version), "{output}");
}

/// One test per client and mode: each failure names the pair, and they run side by side.
macro_rules! deliveries {
    ($($name:ident: $client:expr, $mode:expr;)*) => {
        $(#[test] fn $name() { delivers($client, $mode); })*
    };
}

deliveries! {
    swaks_delivers_in_clear: swaks, Mode::Clear;
    swaks_delivers_by_tls_1_2: swaks, Mode::Tls12;
    swaks_delivers_by_tls_1_3: swaks, Mode::Tls13;
    openssl_delivers_a_pipelined_session_by_tls_1_2: openssl, Mode::Tls12;
    openssl_delivers_a_pipelined_session_by_tls_1_3: openssl, Mode::Tls13;
    gnutls_delivers_a_pipelined_session_by_tls_1_2: gnutls, Mode::Tls12;
    gnutls_delivers_a_pipelined_session_by_tls_1_3: gnutls, Mode::Tls13;
    curl_delivers_in_clear: curl, Mode::Clear;
    curl_delivers_by_tls_1_2: curl, Mode::Tls12;
    curl_delivers_by_tls_1_3: curl, Mode::Tls13;
    smtplib_delivers_in_clear: smtplib, Mode::Clear;
    smtplib_delivers_by_tls_1_2: smtplib, Mode::Tls12;
    smtplib_delivers_by_tls_1_3: smtplib, Mode::Tls13;
    msmtp_delivers_in_clear: msmtp, Mode::Clear;
    msmtp_delivers_by_tls_1_2: msmtp, Mode::Tls12;
    msmtp_delivers_by_tls_1_3: msmtp, Mode::Tls13;
}

#[test]
fn posttls_finger_verifies_tls_1_2() {
    let front = Front::new(&[]);
    posttls_finger(&front.stage, front.at, Mode::Tls12, &front.identity);
}

#[test]
fn posttls_finger_verifies_tls_1_3() {
    let front = Front::new(&[]);
    posttls_finger(&front.stage, front.at, Mode::Tls13, &front.identity);
}

/// The echo backend writes what it accepts to stderr, so the child's stderr is shown to be ours, unmixed with the dialogue.
#[test]
fn mailfront_echo_is_a_child_too() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let unused = crate::letter::Queue::new(&stage, "unused");
    let nobody = stage.unused_port();
    let argv = crate::front::wrapper(&identity, &[], nobody, &["mailfront", "smtp", "echo", "accept"]);
    let at = crate::front::tcpserver(&stage, "front", &argv, &unused);
    swaks(&stage, at, Mode::Clear, &identity, &letter("echo"));
    stage.wait_until_childless("front");
    let log = stage.log("front");
    for line in [format!("MAIL FROM:<{SENDER}>"), format!("RCPT TO:<{RECIPIENT}>"), "From: <".to_owned()] {
        assert!(log.contains(&line), "{line} is missing:\n{log}");
    }
}

/// Under `--require-tls` no letter passes in clear, and all do through TLS.
#[test]
fn required_tls_turns_a_clear_delivery_away_and_takes_a_secret_one() {
    let front = Front::new(&["--require-tls"]);
    let text = letter("required");
    let mut clear = front.stage.command(["swaks", "--ehlo", "client.example", "--from", SENDER, "--to", RECIPIENT]);
    clear.arg("--server").arg(front.at.ip().to_string()).arg("--port").arg(front.at.port().to_string());
    let refused = front.stage.run(&mut clear, b"");
    assert!(!refused.status.success(), "{}", refused.output);
    assert!(refused.output.contains("530 5.7.0 Must issue a STARTTLS command first"), "{}", refused.output);
    swaks(&front.stage, front.at, Mode::Tls13, &front.identity, &text);
    front.delivered(true, &text);
}

/// The whole session in one segment, in clear: all of it behind EHLO reaches the child in order.
#[test]
fn a_pipelined_session_in_clear_is_delivered() {
    use std::io::{Read, Write};
    let front = Front::new(&[]);
    let text = letter("pipelined");
    let mut client = std::net::TcpStream::connect(front.at).expect("connect");
    client.set_read_timeout(Some(crate::stage::PATIENCE)).expect("time-out");
    client.write_all(&pipelined_session(&text)).expect("write");
    let mut replies = String::new();
    client.read_to_string(&mut replies).expect("replies");
    let codes: Vec<&str> =
        replies.lines().filter(|line| line.as_bytes().get(3) == Some(&b' ')).map(|line| &line[..3]).collect();
    assert_eq!(codes, ["220", "250", "250", "250", "354", "250", "221"], "{replies}");
    assert!(on_the_wire(&text).ends_with(b"\r\n.\r\n"));
    front.delivered(false, &text);
}
