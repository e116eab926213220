//! Real servers read the PROXY header: who then relays and who does not, and what they take the client to be.
//!
//! The client's address is what tcpserver would have said of a client from elsewhere; only the header can have told it.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};

use crate::clients::{Mode, swaks};
use crate::front::{Identity, MAILFRONT, sessions_ended_well, tcpserver, wrapper};
use crate::jail;
use crate::letter::{Queue, letter, maildir_holds};
use crate::stage::{PATIENCE, Stage, wait_for};
use crate::stream::wait_readable;
use crate::wire::Wire;

/// The options that send a header, and how they are called.
const HEADERS: [(&str, &[&str]); 3] = [
    ("v1", &["--send-proxy", "v1"]),
    ("v2", &["--send-proxy", "v2"]),
    ("v2-late", &["--send-proxy", "v2", "--proxy-facts", "late"]),
];

/// The UCSPI server's variables: the client's end and ours.
pub(crate) type Ends = [(&'static str, &'static str); 2];

/// A client from elsewhere that has dialled port 25.
pub(crate) const OUTSIDE: Ends = [("192.0.2.7", "4711"), ("192.0.2.25", "25")];

/// A wrapper before mailfront, its client being one with these ends.
#[track_caller]
pub(crate) fn front(stage: &Stage, name: &str, ends: Ends, wrapper: Vec<OsString>, queue: &Queue) -> SocketAddrV4 {
    let [(client, client_port), (local, local_port)] = ends;
    let variables = [("REMOTEIP", client), ("REMOTEPORT", client_port), ("LOCALIP", local), ("LOCALPORT", local_port)];
    let variables = variables.map(|(name, value)| format!("TCP{name}={value}").into());
    tcpserver(stage, name, &[&["env".into()], &variables[..], &wrapper].concat(), queue)
}

/// Whether a client that comes through STARTTLS may send to a domain that is nobody's here.
#[track_caller]
fn relays(stage: &Stage, at: SocketAddrV4) -> bool {
    let mut command = stage.command(["swaks", "--tls", "--ehlo", "client.example", "--quit-after", "RCPT"]);
    command.args(["--from", "sender@client.example", "--to", "someone@elsewhere.example"]);
    command.arg("--server").arg(at.ip().to_string()).arg("--port").arg(at.port().to_string());
    let output = stage.run(&mut command, b"").output;
    let answer = output.lines().skip_while(|line| !line.contains("RCPT TO:")).nth(1).unwrap_or_default();
    match answer.split(' ').find(|word| word.starts_with(['2', '5'])) {
        Some(code) if code.starts_with("250") => true,
        Some(code) if code.starts_with("55") => false,
        _ => panic!("no answer to RCPT:\n{output}"),
    }
}

/// `server` trusts loopback; with the argument `true` it expects the header of whoever comes from there. Its log, at the end.
#[track_caller]
fn is_an_open_relay_but_for_the_header(server: impl Fn(&Stage, &Identity, bool) -> (SocketAddrV4, String)) {
    for (name, options) in [("none", &[][..])].iter().chain(&HEADERS) {
        let stage = Stage::new();
        let (identity, child) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "child"));
        let is_told = *name != "none";
        let (backend, log) = server(&stage, &identity, is_told);
        let at = front(&stage, "front", OUTSIDE, wrapper(&identity, options, backend, &MAILFRONT), &child);
        assert_eq!(relays(&stage, at), !is_told, "{name}");
        let log = || std::fs::read_to_string(stage.path(&log)).expect("its log");
        let knows = || log().contains("[192.0.2.7]");
        if is_told {
            // Who writes it may be a moment behind.
            wait_for("the address of the header in its log", || knows().then_some(()));
        }
        assert_eq!(knows(), is_told, "{name}: {}", log());
    }
}

#[test]
fn postfix_relays_for_loopback_and_not_for_the_address_of_the_header() {
    is_an_open_relay_but_for_the_header(|stage, identity, is_told| {
        let header = if is_told { "smtpd_upstream_proxy_protocol = haproxy\n" } else { "" };
        let trust =
            "mynetworks = 127.0.0.0/8\nsmtpd_relay_restrictions = permit_mynetworks reject_unauth_destination\n";
        let (at, _) = jail::postfix_with(stage, identity, "TLSv1.3", &format!("{trust}{header}"));
        (at, "postfix/mail.log".to_owned())
    });
}

#[test]
fn exim_relays_for_loopback_and_not_for_the_address_of_the_header() {
    is_an_open_relay_but_for_the_header(|stage, identity, is_told| {
        let header = if is_told { "hosts_proxy = 127.0.0.0/8\n" } else { "" };
        let log = "log_selector = +smtp_connection\n";
        let rcpt = "accept hosts = 127.0.0.0/8\n  accept domains = localhost\n  deny message = relay not permitted";
        let more = format!("{header}{log}");
        let (at, _) = jail::exim_with(stage, identity, "NORMAL:-VERS-ALL:+VERS-TLS1.3", &more, rcpt);
        (at, "exim/test/mainlog".to_owned())
    });
}

#[test]
fn postfix_takes_a_letter_behind_each_header() {
    for (_, options) in HEADERS {
        let stage = Stage::new();
        let (identity, child) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "child"));
        let (backend, maildir) =
            jail::postfix_with(&stage, &identity, "TLSv1.3", "smtpd_upstream_proxy_protocol = haproxy\n");
        let at = front(&stage, "front", OUTSIDE, wrapper(&identity, options, backend, &MAILFRONT), &child);
        let text = letter("through-tls");
        swaks(&stage, at, Mode::Tls13, &identity, &text);
        maildir_holds(maildir, &text);
        child.is_empty();
        sessions_ended_well(&stage);
    }
}

/// A server that passes what is behind the header on to `backend`; where it listens. Its log is `reader.log`.
type Reader = fn(&Stage, SocketAddrV4) -> SocketAddrV4;

/// HAProxy; `bind` is what it does besides reading the header.
#[track_caller]
pub(crate) fn haproxy(stage: &Stage, backend: SocketAddrV4, bind: &str) -> SocketAddrV4 {
    let at = stage.unused_port();
    let configuration = format!(
        "global\n  log stdout format raw local0\ndefaults\n  mode tcp\n  timeout connect 60s\n  timeout client 60s\n  timeout server 60s\n\
         listen smtp\n  bind {at} accept-proxy {bind}\n  server mailfront {backend}\n  log global\n  \
         log-format \"told %ci %cp %fi %fp %[fc_pp_authority]\"\n"
    );
    let file = stage.write("haproxy.cfg", configuration);
    stage.start("reader", stage.command(["haproxy", "-db", "-f"]).arg(file), at);
    at
}

/// Debian's knows no TLVs (1.22).
fn nginx(stage: &Stage, backend: SocketAddrV4) -> SocketAddrV4 {
    let at = stage.unused_port();
    let file = |name: &str| stage.path(name).display().to_string();
    let configuration = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nmaster_process off;\npid {};\nerror_log stderr;\n\
         events {{}}\nstream {{\n  log_format told 'told $proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr \
         $proxy_protocol_server_port -';\n  server {{ listen {at} proxy_protocol; proxy_pass {backend}; access_log {} told; }}\n}}\n",
        file("nginx.pid"),
        file("reader.log")
    );
    let configuration = stage.write("nginx.conf", configuration);
    stage.start("reader", stage.command(["nginx", "-e", "stderr", "-c"]).arg(configuration), at);
    at
}

const ENDS: [(Ends, &str); 3] = [
    (OUTSIDE, "192.0.2.7 4711 192.0.2.25 25"),
    ([("2001:db8::7", "65535"), ("2001:db8::25", "587")], "2001:db8::7 65535 2001:db8::25 587"),
    ([("::ffff:192.0.2.7", "4711"), ("::ffff:192.0.2.25", "25")], "192.0.2.7 4711 192.0.2.25 25"),
];

#[track_caller]
fn parses_every_header(reader: Reader, knows_names: bool) {
    let stage = Stage::new();
    let (identity, queue) = (Identity::self_signed(&stage, "own"), Queue::new(&stage, "backend"));
    let child = Queue::new(&stage, "child");
    let backend = tcpserver(&stage, "backend", &MAILFRONT.map(Into::into), &queue);
    let server = reader(&stage, backend);
    let mut expected = Vec::new();
    for (name, options) in HEADERS {
        for (number, (ends, shown)) in ENDS.into_iter().enumerate() {
            let options = [options, &["--way", "plain"]].concat();
            let argv = wrapper(&identity, &options, server, &MAILFRONT);
            let at = front(&stage, &format!("front-{name}-{number}"), ends, argv, &child);
            swaks(&stage, at, Mode::Tls13, &identity, &letter(name));
            // swaks asks for it.
            expected.push(format!("told {shown} {}", if name == "v2-late" && knows_names { "localhost" } else { "-" }));
            let told = wait_for("the reader's log", || {
                let log = stage.log("reader");
                let told: Vec<_> = log.lines().filter(|line| line.starts_with("told ")).map(str::to_owned).collect();
                (told.len() >= expected.len()).then_some(told)
            });
            assert_eq!(told, expected, "{name}");
        }
    }
    assert_eq!(queue.entries().len(), expected.len(), "letters went through");
    child.is_empty();
}

#[test]
fn haproxy_parses_every_header() {
    parses_every_header(|stage, backend| haproxy(stage, backend, ""), true);
}

#[test]
fn nginx_parses_every_header() {
    parses_every_header(nginx, false);
}

/// What Varnish makes of a header, by its module for that.
#[track_caller]
fn told_to_varnish(varnish: SocketAddrV4, header: &[u8]) -> String {
    let mut connection = TcpStream::connect(varnish).expect("connect");
    connection.set_read_timeout(Some(PATIENCE)).expect("time-out");
    connection.write_all(&[header, b"GET / HTTP/1.0\r\n\r\n"].concat()).expect("write");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("an answer");
    answer.rsplit("\r\n\r\n").next().expect("a body").to_owned()
}

fn varnish(stage: &Stage) -> SocketAddrV4 {
    let at = stage.unused_port();
    let program = "vcl 4.1;\nimport proxy;\nbackend none none;\nsub vcl_recv { return (synth(200)); }\nsub vcl_synth {\n  \
                   set resp.body = \"\" + client.ip + \" tls=\" + proxy.is_ssl() + \" \" + proxy.ssl_version() + \" \" + proxy.ssl_cipher() + \
                   \" verify=\" + proxy.ssl_verify_result() + \" name=\" + proxy.authority() + \" protocol=\" + proxy.alpn();\n  \
                   return (deliver);\n}\n";
    let file = stage.write("told.vcl", program);
    let mut command = stage.command(["varnishd", "-F", "-s", "malloc,1M", "-a"]);
    command.arg(format!("{at},PROXY")).arg("-n").arg(stage.path("varnish")).arg("-f").arg(file);
    stage.start("varnish", &mut command, at);
    at
}

/// Runs a client against a wrapper so told; HOST takes the header down and goes. The header, and what the client says.
#[track_caller]
fn taken_down(stage: &Stage, name: &str, options: &[&str], client: &[&str]) -> (Vec<u8>, String) {
    let (identity, child) = (Identity::self_signed(stage, name), Queue::new(stage, name));
    let listener = TcpListener::bind(stage.unused_port()).expect("bind");
    let Ok(std::net::SocketAddr::V4(host)) = listener.local_addr() else { panic!("an address") };
    let options = [&["--way", "plain", "--send-proxy", "v2"], options].concat();
    let at = front(stage, name, OUTSIDE, wrapper(&identity, &options, host, &MAILFRONT), &child);
    let mut command = stage.command(["openssl", "s_client", "-starttls", "smtp", "-ign_eof", "-connect"]);
    command.arg(at.to_string()).args(client);
    std::thread::scope(|scope| {
        let header = scope.spawn(|| {
            wait_readable(&listener, std::time::Instant::now() + PATIENCE).expect("HOST is dialled");
            let (connection, _) = listener.accept().expect("HOST is dialled");
            Wire::new(connection).proxy_header().expect("a header")
        });
        let said = stage.run(&mut command, b"").output;
        (header.join().expect("a header"), said)
    })
}

/// What the client says that it agreed on, Varnish reads from the header.
#[test]
fn varnish_reads_the_facts_that_the_client_knows() {
    let stage = Stage::new();
    let varnish = varnish(&stage);
    let (header, _) = taken_down(&stage, "early", &[], &["-tls1_3", "-servername", "mx.example", "-alpn", "smtp"]);
    assert_eq!(told_to_varnish(varnish, &header), "192.0.2.7 tls=true   verify=1 name= protocol=");
    let clients: [&[&str]; 4] = [
        &["-tls1_3", "-servername", "mx.example", "-alpn", "smtp"],
        &["-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256", "-noservername"],
        &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES256-GCM-SHA384", "-noservername", "-alpn", "esmtp,smtp"],
        &["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305", "-servername", "mx.example"],
    ];
    for (number, options) in clients.into_iter().enumerate() {
        let (header, said) = taken_down(&stage, &format!("late-{number}"), &["--proxy-facts", "late"], options);
        let word = |behind: &str| {
            let line = said.split(behind).nth(1).unwrap_or_else(|| panic!("no {behind}: {said}"));
            line.split([',', '\n', ' ']).next().unwrap_or_default().to_owned()
        };
        let protocol = if said.contains("No ALPN negotiated") { String::new() } else { word("ALPN protocol: ") };
        let server_name = if options.contains(&"-servername") { "mx.example" } else { "" };
        let (version, cipher) = (word("New, "), word("Cipher is "));
        let expected = format!("192.0.2.7 tls=true {version} {cipher} verify=1 name={server_name} protocol={protocol}");
        assert_eq!(told_to_varnish(varnish, &header), expected, "{options:?}");
    }
}
