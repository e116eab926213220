//! What is asked of a listener: bots, a steady stream of connections, and handshakes, beside the same handshakes in memory.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::{ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, ServerConnection};
use starttls_wrapper::tls::{Identity, Tickets, server_setup};

use crate::client::{Client, Server, agreed};
use crate::modes::{Latencies, pause, quoted};

/// Handshakes at a time: a server that has as many to do as it can.
const HURRY: usize = 8;

/// Connections of a stream that may be open at a time.
const CROWD: usize = 64;

/// Connect, EHLO, QUIT, `at_once` of them at any time.
pub(crate) fn bots(server: &Server, count: usize, at_once: usize) -> io::Result<String> {
    let began = Instant::now();
    let one = |_| -> io::Result<()> {
        let mut client = server.connect()?;
        client.expect(220)?;
        client.ask("EHLO bot.example", 250)?;
        client.quit()?;
        client.leave();
        Ok(())
    };
    let (failed, error) = tickets(count, at_once, one)?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(format!(r#""seconds":{seconds:.6},"failed":{failed},"error":{}"#, quoted(error.as_deref())))
}

/// So many connections a second, whatever becomes of those before: from the connect to the whole greeting, then QUIT.
pub(crate) fn stream(server: &Server, count: usize, rate: usize) -> io::Result<String> {
    let began = Instant::now();
    let (sender, receiver) = std::sync::mpsc::channel();
    let one = |number: usize| -> io::Result<()> {
        let due = began
            + Duration::from_secs(1) * u32::try_from(number).unwrap_or(u32::MAX) / u32::try_from(rate).unwrap_or(1);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let start = Instant::now();
        let mut client = server.connect()?;
        client.expect(220)?;
        let _ = sender.send((start.elapsed(), start - due));
        client.quit()?;
        client.leave();
        Ok(())
    };
    let (failed, error) = tickets(count, CROWD, one)?;
    let seconds = began.elapsed().as_secs_f64();
    drop(sender);
    let (mut greeting, mut late) = (Latencies::new()?, Latencies::new()?);
    for (took, after) in receiver {
        greeting.record(took);
        late.record(after);
    }
    Ok(format!(
        r#""seconds":{seconds:.6},"greeting":{},"late":{},"failed":{failed},"error":{}"#,
        greeting.json(),
        late.json(),
        quoted(error.as_deref())
    ))
}

/// Has `at_once` threads do `one` for each number below `count`. How many failed, and why the last one did.
fn tickets(
    count: usize,
    at_once: usize,
    one: impl Fn(usize) -> io::Result<()> + Send + Sync,
) -> io::Result<(usize, Option<String>)> {
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        let mut error = None;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return error;
            }
            if let Err(why) = one(number) {
                failed.fetch_add(1, Ordering::Relaxed);
                error = Some(why.to_string());
            }
        }
    };
    let errors = thread::scope(|scope| {
        let threads: io::Result<Vec<_>> =
            (0..at_once).map(|_| thread::Builder::new().stack_size(256 * 1024).spawn_scoped(scope, work)).collect();
        threads.map(|threads| threads.into_iter().filter_map(|one| one.join().ok().flatten()).collect::<Vec<_>>())
    })?;
    Ok((failed.into_inner(), errors.into_iter().next_back()))
}

/// So many sessions are brought to the 220 of STARTTLS; what is measured is their handshakes, and nothing else.
pub(crate) fn handshakes(server: &Server, count: usize) -> io::Result<String> {
    let open = || -> io::Result<Client> {
        let mut client = server.connect()?;
        client.expect(220)?;
        client.ask("EHLO client.example", 250)?;
        client.ask("STARTTLS", 220)?;
        Ok(client)
    };
    let mut clients = (0..count).map(|_| open()).collect::<io::Result<Vec<_>>>()?;
    pause("ready")?;
    let began = Instant::now();
    let secure = |part: &mut [Client]| part.iter_mut().try_for_each(|client| client.secure(server));
    thread::scope(|scope| {
        let parts = clients.chunks_mut(count.div_ceil(HURRY));
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || secure(part))).collect();
        let mut joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
        joined.try_for_each(|one| one.unwrap_or_else(|_| Err(io::Error::other("a worker panicked"))))
    })?;
    let seconds = began.elapsed().as_secs_f64();
    // The last one's Finished has been read when its answer is there.
    if let Some(client) = clients.last_mut() {
        client.ask("NOOP", 250)?;
    }
    let tls = clients.first().and_then(Client::negotiated).map(|(tls, _)| tls);
    pause(&format!("{{\"seconds\":{seconds:.6},\"tls\":{}}}", quoted(tls.as_deref())))?;
    Ok(String::new())
}

/// The server's part of full handshakes in memory, by the configuration that a listener makes of this certificate and key.
pub(crate) fn reference(client: &Arc<ClientConfig>, cert: &str, key: &str, count: usize) -> io::Result<String> {
    let identity = Identity::from_pem(&std::fs::read(cert)?, &std::fs::read(key)?, UnixTime::now());
    let tickets = Tickets::in_memory().map_err(io::Error::other)?;
    let config = server_setup(&identity.map_err(io::Error::other)?, Some(&tickets)).map_err(io::Error::other)?;
    let (mut server_side, mut tls) = (Latencies::new()?, None);
    for _ in 0..count {
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let mut client = ClientConnection::new(client.clone(), name).map_err(io::Error::other)?;
        let (mut wire, mut spent) = (Vec::new(), Duration::ZERO);
        client.write_tls(&mut wire)?;
        let began = Instant::now();
        let mut server = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        spent += began.elapsed();
        loop {
            let began = Instant::now();
            let answer = take(&mut server, &wire)?;
            spent += began.elapsed();
            wire.clear();
            let mut rest = answer.as_slice();
            while !rest.is_empty() {
                client.read_tls(&mut rest)?;
                client.process_new_packets().map_err(io::Error::other)?;
            }
            client.write_tls(&mut wire)?;
            if wire.is_empty() && !server.is_handshaking() {
                break;
            }
        }
        server_side.record(spent);
        tls = agreed(&server);
    }
    Ok(format!(r#""server":{},"tls":{}"#, server_side.json(), quoted(tls.as_deref())))
}

/// Gives the server these octets; what it answers.
fn take(server: &mut ServerConnection, mut octets: &[u8]) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    while !octets.is_empty() {
        server.read_tls(&mut octets as &mut dyn Read)?;
        server.process_new_packets().map_err(io::Error::other)?;
    }
    while server.wants_write() {
        server.write_tls(&mut answer as &mut dyn Write)?;
    }
    Ok(answer)
}
