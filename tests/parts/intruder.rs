//! An intruder in the tests: gives up its rights as the program does, tries one deed, and prints what came of it: `done`, or
//! the error. Arguments: HOST (`keep`: none; `listener`: none, and it accepts connections), a port, a file that may be read, the deed, and what it is done to.

use std::error::Error;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::net::{SendFlags, SocketAddrUnix, send, sendto};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use starttls_wrapper::sys::dial::{Place, Target};
use starttls_wrapper::sys::privileges;
use starttls_wrapper::sys::sandbox::{Confined, Needs, confine};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [host, port, file, deed, object] = &arguments[..] else { return Err("HOST PORT FILE DEED OBJECT".into()) };
    let place = Place::Tcp(host.clone(), port.parse()?);
    let target =
        (!matches!(host.as_str(), "keep" | "listener")).then_some(Target { place, source: None, loopback_only: false });
    let targets = target.into_iter().collect();
    let files = if file.is_empty() { Vec::new() } else { vec![file.into()] };
    // It ends with us, however that is, and holds nothing of ours open.
    let mut child =
        Command::new("/bin/cat").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    privileges::harden()?;
    let needs =
        Needs { children: vec![Pid::from_child(&child)], targets, files, listens: host == "listener", peeks: false };
    let confined = confine(&needs);
    if confined != Confined::Wholly {
        println!("{confined:?}");
    }
    match attempt(deed, object) {
        Ok(()) => println!("done"),
        Err(error) => println!("{error}"),
    }
    // The one signal that is left to send.
    kill_process(Pid::from_child(&child), Signal::KILL)?;
    child.wait()?;
    Ok(())
}

/// What the program's last reply leaves with.
const LAST_WORDS: SendFlags = SendFlags::MORE.union(SendFlags::NOSIGNAL);

fn attempt(deed: &str, object: &str) -> Result<(), Box<dyn Error>> {
    match deed {
        "nothing" => {}
        "read" => drop(std::fs::read(object)?),
        "write" => drop(std::fs::OpenOptions::new().append(true).open(object)?),
        "list" => drop(std::fs::read_dir(object)?),
        "connect" => drop(TcpStream::connect(("127.0.0.1", object.parse()?))?),
        "unix" => drop(UnixStream::connect(object)?),
        "say" => assert_eq!(send(std::io::stdin(), b"", LAST_WORDS)?, 0),
        "tell" => assert_eq!(sendto(std::io::stdin(), b"", LAST_WORDS, &SocketAddrUnix::new(object)?)?, 0),
        "listen" => drop(TcpListener::bind("127.0.0.1:0")?),
        "udp" => drop(UdpSocket::bind("127.0.0.1:0")?),
        "thread" => std::thread::spawn(|| ()).join().map_err(|_| "it panicked")?,
        "run" => drop(Command::new(object).status()?),
        "become" => return Err(std::os::unix::process::CommandExt::exec(&mut Command::new(object)).into()),
        "signal" => test_kill_process(Pid::from_raw(object.parse()?).ok_or("no pid")?)?,
        _ => return Err(format!("no deed {deed}").into()),
    }
    Ok(())
}
