//! The mail server of the bench: speaks the least SMTP there is, and throws letters away as fast as it can read them.
//!
//! `bench-sink` serves one session on descriptors 0 and 1, reading the socket or pipe itself in blocks of 64 KiB.
//! `bench-sink --tls CERT KEY` listens on a port of 127.0.0.1, prints it, and serves sessions by TLS from the first octet, each
//! in a thread, until it is killed.
//! With `--silent` at the end either greets nobody, as a server behind `starttls-wrapper --mute`; with `--as-tls` before that the first
//! does a cipher's work over all that it says and reads, and reads and writes as much at once as the second (`cipher.rs`).
//! TCP_NODELAY, which the second sets, is then tcpserver's to set (`-D`).
//! A letter is not parsed: its end is CR LF . CR LF at the end of a read, so nothing may be pipelined behind it.
//!
//! Two commands are the bench's own, for what SMTP has no command for:
//! `XSEND LINES` answers with a reply of that many lines of 64 octets and `250 end` (a large transfer to the client);
//! `XCHUNK OCTETS COUNT` answers 354, then reads COUNT times so many octets and says `250 ok` after each (one chunk at a time).

mod cipher;

use std::env;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use cipher::Cipher;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// Octets asked for in one read.
const BLOCK: usize = 64 * 1024;
/// The same where TLS is spoken, or its pace kept.
const AT_ONCE: usize = 4 * BLOCK;

const END: [u8; 5] = *b"\r\n.\r\n";

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let mut words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let greeting = if words.pop_if(|word| *word == "--silent").is_some() { "" } else { "220 sink ESMTP\r\n" };
    let as_tls = words.pop_if(|word| *word == "--as-tls").is_some();
    match words[..] {
        [] => {
            let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
            let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
            if as_tls {
                let (input, cipher) = (BufReader::with_capacity(AT_ONCE, input), Some(Cipher::new()?));
                serve(Ends { input, output, cipher }, greeting)
            } else {
                serve(Ends { input, output, cipher: None }, greeting)
            }
        }
        ["--tls", cert, key] if !as_tls => listen(cert, key, greeting),
        _ => Err(io::Error::other("usage: bench-sink [--tls CERT KEY | --as-tls] [--silent]")),
    }
}

fn listen(cert: &str, key: &str, greeting: &'static str) -> io::Result<()> {
    aws_lc_rs::init(); // the build leaves this to the program
    let chain = CertificateDer::pem_file_iter(cert).map_err(io::Error::other)?;
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(io::Error::other)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(io::Error::other)?;
    let config = Arc::new(config);
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    println!("{}", listener.local_addr()?.port());
    for socket in listener.incoming() {
        let (socket, config) = (socket?, config.clone());
        // A session that breaks is its own matter.
        thread::spawn(move || over_tls(socket, config, greeting));
    }
    Ok(())
}

fn over_tls(socket: TcpStream, config: Arc<ServerConfig>, greeting: &str) -> io::Result<()> {
    socket.set_nodelay(true)?;
    // rustls asks for 4 KiB at a time; the buffer makes large reads of them. One descriptor: there may be ten thousand sessions.
    let ends = Ends { input: BufReader::with_capacity(AT_ONCE, &socket), output: &socket, cipher: None };
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, ends);
    let served = serve(&mut stream, greeting);
    stream.conn.send_close_notify();
    stream.flush()?;
    served
}

/// Two descriptors as one stream.
struct Ends<R, W> {
    input: R,
    output: W,
    cipher: Option<Cipher>,
}

impl<R: Read, W> Read for Ends<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.cipher.as_mut().map_or(Ok(()), |cipher| cipher.work_over(&buffer[..count]))?;
        Ok(count)
    }
}

impl<R, W: Write> Write for Ends<R, W> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        match &mut self.cipher {
            Some(cipher) => cipher.write(&mut self.output, octets),
            None => self.output.write(octets),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// One session, until QUIT or the end of the client.
fn serve(mut stream: impl Read + Write, greeting: &str) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    let mut held = 0;
    say(&mut stream, greeting)?;
    loop {
        while let Some(end) = block[..held].iter().position(|octet| *octet == b'\n') {
            let line = String::from_utf8_lossy(&block[..end]).trim().to_ascii_uppercase();
            block.copy_within(end + 1..held, 0);
            held -= end + 1;
            let mut words = line.split(' ');
            let verb = words.next().unwrap_or_default();
            let mut number = || words.next().and_then(|word| word.parse::<usize>().ok()).unwrap_or_default();
            match verb {
                "EHLO" => say(&mut stream, "250-sink\r\n250-PIPELINING\r\n250 8BITMIME\r\n")?,
                "DATA" => {
                    say(&mut stream, "354 go on\r\n")?;
                    let size = swallow(&mut stream, &mut block, held)?;
                    held = 0;
                    say(&mut stream, &format!("250 {size} octets\r\n"))?;
                }
                "XSEND" => pour(&mut stream, number())?,
                "XCHUNK" => chunks(&mut stream, number(), number())?,
                "QUIT" => return say(&mut stream, "221 sink\r\n"),
                _ => say(&mut stream, "250 ok\r\n")?,
            }
        }
        match stream.read(&mut block[held..])? {
            0 => return Ok(()),
            count => held += count,
        }
    }
}

fn say(stream: &mut impl Write, reply: &str) -> io::Result<()> {
    stream.write_all(reply.as_bytes())?;
    stream.flush()
}

/// Reads a letter to its end; `held` octets of it are in the block already. Returns its size, the final dot included.
fn swallow(stream: &mut impl Read, block: &mut [u8], held: usize) -> io::Result<u64> {
    let mut tail = *b"\0\0\0\r\n"; // the line end of DATA counts for a letter of nothing
    let (mut size, mut count) = (0, held);
    loop {
        size += count as u64;
        let fresh = &block[count.saturating_sub(END.len())..count];
        tail.copy_within(fresh.len().., 0);
        tail[END.len() - fresh.len()..].copy_from_slice(fresh);
        if tail == END {
            return Ok(size);
        }
        count = stream.read(block)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn pour(stream: &mut impl Write, lines: usize) -> io::Result<()> {
    let line = format!("250-{}\r\n", "x".repeat(58));
    let block = line.repeat(BLOCK / line.len());
    let whole = lines / (BLOCK / line.len());
    for _ in 0..whole {
        stream.write_all(block.as_bytes())?;
    }
    stream.write_all(line.repeat(lines % (BLOCK / line.len())).as_bytes())?;
    say(stream, "250 end\r\n")
}

fn chunks(stream: &mut (impl Read + Write), octets: usize, count: usize) -> io::Result<()> {
    let mut chunk = vec![0; octets];
    say(stream, "354 go on\r\n")?;
    for _ in 0..count {
        stream.read_exact(&mut chunk)?;
        say(stream, "250 ok\r\n")?;
    }
    Ok(())
}
