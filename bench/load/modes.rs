//! What the load generator does. Each mode returns what it found, as the fields of a JSON object.

use std::io::{self, BufRead};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use hdrhistogram::iterators::IterationValue;

use crate::client::{Client, Server};

/// Trips that are made before those that count.
const WARM: usize = 200;

/// Nanoseconds, up to a minute, to three digits.
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> io::Result<Self> {
        Histogram::new_with_bounds(1, 60_000_000_000, 3).map(Self).map_err(io::Error::other)
    }

    pub(crate) fn record(&mut self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.0.saturating_record(nanoseconds);
    }

    fn add(&mut self, other: &Self) -> io::Result<()> {
        self.0.add(&other.0).map_err(io::Error::other)
    }

    /// Microseconds; without samples all zero. `values` are pairs: a latency, and how many had it.
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    pub(crate) fn json(&self) -> String {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        let (p50, p99, p999) = (at(0.5), at(0.99), at(0.999));
        let pair = |value: IterationValue<u64>| {
            format!("[{:.3},{}]", value.value_iterated_to() as f64 / 1e3, value.count_at_value())
        };
        let values = self.0.iter_recorded().map(pair).collect::<Vec<_>>().join(",");
        format!(r#"{{"p50":{p50:.3},"p99":{p99:.3},"p999":{p999:.3},"count":{},"values":[{values}]}}"#, self.0.len())
    }
}

/// Whole sessions of one mail each, `at_once` of them at any time; with `together`, none sends mail before as many are open.
pub(crate) fn sessions(server: &Server, count: usize, at_once: usize, together: bool) -> io::Result<String> {
    let barrier = Barrier::new(at_once);
    let began = Instant::now();
    let parts = thread::scope(|scope| {
        let run = || worker(server, count / at_once, together.then_some(&barrier));
        let threads: io::Result<Vec<_>> =
            (0..at_once).map(|_| thread::Builder::new().stack_size(256 * 1024).spawn_scoped(scope, run)).collect();
        threads.map(|threads| threads.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>())
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let mut whole = Part::new()?;
    for part in parts {
        let part = part.map_err(|_| io::Error::other("a worker panicked"))??;
        whole.wall.add(&part.wall)?;
        whole.greeting.add(&part.greeting)?;
        whole.resumed += part.resumed;
        whole.failed += part.failed;
        whole.error = whole.error.or(part.error);
        whole.tls = whole.tls.or(part.tls);
    }
    Ok(format!(
        r#""seconds":{seconds:.6},"wall":{},"greeting":{},"resumed":{},"failed":{},"error":{},"tls":{}"#,
        whole.wall.json(),
        whole.greeting.json(),
        whole.resumed,
        whole.failed,
        quoted(whole.error.as_deref()),
        quoted(whole.tls.as_deref()),
    ))
}

struct Part {
    wall: Latencies,
    greeting: Latencies,
    resumed: usize,
    failed: usize,
    error: Option<String>,
    tls: Option<String>,
}

impl Part {
    fn new() -> io::Result<Self> {
        let (wall, greeting) = (Latencies::new()?, Latencies::new()?);
        Ok(Self { wall, greeting, resumed: 0, failed: 0, error: None, tls: None })
    }
}

fn worker(server: &Server, count: usize, together: Option<&Barrier>) -> io::Result<Part> {
    let mut part = Part::new()?;
    let letter = small();
    for _ in 0..count {
        let began = Instant::now();
        let opened = open(server, &mut part.greeting);
        if let Some(barrier) = together {
            barrier.wait(); // those that failed come here, too
        }
        let done = opened.and_then(|mut client| {
            client.letter(&letter)?;
            client.quit()?;
            Ok(client)
        });
        match done {
            Ok(client) => {
                part.wall.record(began.elapsed());
                if let Some((tls, resumed)) = client.negotiated() {
                    part.resumed += usize::from(resumed);
                    part.tls = Some(tls);
                }
                client.leave();
            }
            Err(error) => {
                part.failed += 1;
                part.error = Some(error.to_string());
            }
        }
    }
    Ok(part)
}

fn open(server: &Server, greeting: &mut Latencies) -> io::Result<Client> {
    let began = Instant::now();
    let mut client = server.connect()?;
    client.expect(220)?;
    greeting.record(began.elapsed());
    client.hello(server)?;
    Ok(client)
}

/// Sessions that only wait for the greeting and go.
pub(crate) fn greetings(server: &Server, count: usize) -> io::Result<String> {
    let mut greeting = Latencies::new()?;
    for _ in 0..count {
        let began = Instant::now();
        let mut client = server.connect()?;
        client.expect(220)?;
        greeting.record(began.elapsed());
        client.quit()?;
        client.leave();
    }
    Ok(format!(r#""greeting":{}"#, greeting.json()))
}

/// A large transfer after MAIL and RCPT: a letter in blocks of so many octets, or the sink's XSEND.
pub(crate) fn bulk(server: &Server, octets: usize, block: usize, from_server: bool) -> io::Result<String> {
    let mut client = server.open()?;
    client.envelope()?;
    if !from_server {
        client.ask("DATA", 354)?;
    }
    let lines = "x".repeat(62) + "\r\n";
    let text = lines.repeat(block.max(64).div_ceil(64)).into_bytes();
    pause("ready")?;
    let began = Instant::now();
    if from_server {
        client.send(format!("XSEND {}\r\n", octets / 64).as_bytes())?;
        let last = client.drain(octets / 64 * 64 + "250 end\r\n".len())?;
        if !last.ends_with(b"\r\n250 end\r\n") {
            return Err(io::Error::other("a long reply, but not the one of bench-sink"));
        }
    } else {
        let mut left = octets;
        while left > 0 {
            let count = left.min(block);
            client.send(&text[..count])?;
            left -= count;
        }
        client.send(b"\r\n.\r\n")?;
        client.expect(250)?;
    }
    let seconds = began.elapsed().as_secs_f64();
    pause(&format!("{{\"seconds\":{seconds:.6}}}"))?;
    client.quit()?;
    client.leave();
    Ok(String::new())
}

/// One command and its reply, again and again: in the relay (after RCPT), or while the dialogue is still snooped upon.
pub(crate) fn trips(server: &Server, count: usize, snoop: bool) -> io::Result<String> {
    let mut client = server.open()?;
    if !snoop {
        client.envelope()?;
    }
    for _ in 0..WARM {
        client.ask("NOOP", 250)?;
    }
    let mut trip = Latencies::new()?;
    pause("ready")?;
    for _ in 0..count {
        let began = Instant::now();
        client.send(b"NOOP\r\n")?;
        client.expect(250)?;
        trip.record(began.elapsed());
    }
    pause(&format!("{{\"trip\":{}}}", trip.json()))?;
    client.quit()?;
    client.leave();
    Ok(String::new())
}

/// Chunks of so many octets to the server, each sent when the one before was acknowledged by the sink.
pub(crate) fn chunks(server: &Server, octets: usize, count: usize) -> io::Result<String> {
    let mut client = server.open()?;
    client.envelope()?;
    let chunk = vec![b'x'; octets];
    let warm = (count / 10).max(4);
    client.ask(&format!("XCHUNK {octets} {}", count + warm), 354)?;
    let mut trip = Latencies::new()?;
    for number in 0..count + warm {
        if number == warm {
            pause("ready")?;
        }
        let began = Instant::now();
        client.send(&chunk)?;
        client.expect(250)?;
        if number >= warm {
            trip.record(began.elapsed());
        }
    }
    pause(&format!("{{\"trip\":{}}}", trip.json()))?;
    client.quit()?;
    client.leave();
    Ok(String::new())
}

/// So many sessions, held open and silent: in the snoop (after EHLO), or in the relay with one mail done. `at_once` are opened at a time.
pub(crate) fn hold(server: &Server, count: usize, at_once: usize, snoop: bool) -> io::Result<String> {
    let open = |part: usize| -> io::Result<Vec<Client>> {
        let one = |_| {
            let mut client = server.open()?;
            if !snoop {
                client.letter(&small())?;
            }
            Ok(client)
        };
        (part..count).step_by(at_once).map(one).collect()
    };
    let clients: io::Result<Vec<_>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|part| scope.spawn(move || open(part))).collect();
        let joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
        joined.map(|one| one.unwrap_or_else(|_| Err(io::Error::other("a worker panicked")))).collect()
    });
    let clients: Vec<Client> = clients?.into_iter().flatten().collect();
    pause("ready")?;
    pause("{}")?;
    for mut client in clients {
        client.quit()?;
        client.leave();
    }
    Ok(String::new())
}

/// 2 KiB.
fn small() -> Vec<u8> {
    let line = "x".repeat(62) + "\r\n";
    format!("Subject: small\r\n\r\n{}", line.repeat(31)).into_bytes()
}

/// Says where we are, and waits until whoever runs us has read its clocks.
pub(crate) fn pause(word: &str) -> io::Result<()> {
    println!("{word}");
    if io::stdin().lock().read_line(&mut String::new())? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// A JSON string; what would need escaping in one is left out of the words of a server.
pub(crate) fn quoted(text: Option<&str>) -> String {
    let simple = |octet: &char| octet.is_ascii() && !octet.is_ascii_control() && !matches!(octet, '"' | '\\');
    text.map_or_else(|| "null".to_owned(), |text| format!("\"{}\"", text.chars().filter(simple).collect::<String>()))
}

/// How long a session may stand still, unless told otherwise.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
