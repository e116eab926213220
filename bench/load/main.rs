//! The load generator of bench/run: SMTP sessions on loopback, with or without TLS; what it found goes to stdout as JSON.
//!
//! ```text
//! bench-load session  whole sessions of one mail of 2 KiB   --sessions N --at-once N [--together]
//! bench-load greeting connect, greeting, QUIT               --sessions N
//! bench-load bulk     one large letter, or XSEND            --octets N --block N [--from-server]
//! bench-load trip     NOOP and its reply                    --count N [--snoop]
//! bench-load chunk    XCHUNK of the sink                    --block N --count N
//! bench-load hold     sessions that are silent              --sessions N [--at-once N] [--snoop]
//! bench-load secure   the handshakes of STARTTLS            --sessions N
//! bench-load bot      connect, EHLO, QUIT                   --sessions N --at-once N
//! bench-load stream   so many connections a second, QUIT    --sessions N --rate N
//! bench-load memory   the server's part of handshakes, in memory   --sessions N --key FILE
//! ```
//! All: --port N, --tls starttls|implicit|promised|paced (STARTTLS is said and all goes on in clear; a cipher's work being done), --ca FILE,
//! --resume (keep tickets), --patience SECONDS.
//! bulk, trip, chunk, hold and secure print `ready` before what is measured and their JSON after it, and wait for a line on stdin each time, so
//! that whoever runs us can read the clocks of the server's processes while the session is still there.

#[path = "../cipher.rs"]
mod cipher;
mod client;
mod listener;
mod modes;

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use lexopt::prelude::*;

use crate::client::{Server, Tls};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-load: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Wishes {
    mode: String,
    sessions: usize,
    at_once: usize,
    octets: usize,
    block: usize,
    count: usize,
    together: bool,
    from_server: bool,
    snoop: bool,
    rate: usize,
    cert: Option<String>,
    key: String,
    server: Server,
}

fn run() -> io::Result<()> {
    let wishes = wishes().map_err(io::Error::other)?;
    let server = &wishes.server;
    let found = match wishes.mode.as_str() {
        "session" => modes::sessions(server, wishes.sessions, wishes.at_once, wishes.together)?,
        "greeting" => modes::greetings(server, wishes.sessions)?,
        "bulk" => modes::bulk(server, wishes.octets, wishes.block, wishes.from_server)?,
        "trip" => modes::trips(server, wishes.count, wishes.snoop)?,
        "chunk" => modes::chunks(server, wishes.block, wishes.count)?,
        "hold" => modes::hold(server, wishes.sessions, wishes.at_once, wishes.snoop)?,
        "secure" => listener::handshakes(server, wishes.sessions)?,
        "bot" => listener::bots(server, wishes.sessions, wishes.at_once)?,
        "stream" => listener::stream(server, wishes.sessions, wishes.rate)?,
        "memory" => {
            let (client, cert) =
                server.config.as_ref().zip(wishes.cert.as_ref()).ok_or_else(|| io::Error::other("TLS needs --ca"))?;
            listener::reference(client, cert, &wishes.key, wishes.sessions)?
        }
        mode => return Err(io::Error::other(format!("no mode {mode:?}"))),
    };
    if !found.is_empty() {
        println!("{{{found}}}");
    }
    Ok(())
}

fn wishes() -> Result<Wishes, Box<dyn std::error::Error + Send + Sync>> {
    let (mut mode, mut port, mut tls, mut ca) = (String::new(), 0, Tls::Never, None);
    let (mut resume, mut patience) = (false, modes::PATIENCE);
    let (mut sessions, mut at_once, mut octets, mut block, mut count) = (1, 1, 1 << 20, 256 * 1024, 1);
    let (mut rate, mut key) = (1000, String::new());
    let (mut together, mut from_server, mut snoop) = (false, false, false);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Value(word) if mode.is_empty() => mode = word.string()?,
            Long("port") => port = parser.value()?.parse()?,
            Long("tls") => {
                tls = match parser.value()?.string()?.as_str() {
                    "starttls" => Tls::ByCommand,
                    "implicit" => Tls::AtOnce,
                    "promised" => Tls::Promised,
                    "paced" => Tls::Paced,
                    other => return Err(format!("--tls {other}").into()),
                };
            }
            Long("ca") => ca = Some(parser.value()?.string()?),
            Long("resume") => resume = true,
            Long("patience") => patience = Duration::from_secs(parser.value()?.parse()?),
            Long("sessions") => sessions = parser.value()?.parse()?,
            Long("at-once") => at_once = parser.value()?.parse::<usize>()?.max(1),
            Long("octets") => octets = parser.value()?.parse()?,
            Long("block") => block = parser.value()?.parse::<usize>()?.max(1),
            Long("count") => count = parser.value()?.parse()?,
            Long("rate") => rate = parser.value()?.parse::<usize>()?.max(1),
            Long("key") => key = parser.value()?.string()?,
            Long("together") => together = true,
            Long("from-server") => from_server = true,
            Long("snoop") => snoop = true,
            other => return Err(other.unexpected().into()),
        }
    }
    let server = Server::new(port, tls, ca.as_deref(), resume, patience)?;
    Ok(Wishes {
        mode,
        sessions,
        at_once,
        octets,
        block,
        count,
        together,
        from_server,
        snoop,
        rate,
        cert: ca,
        key,
        server,
    })
}
