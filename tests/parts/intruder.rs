//! An intruder in the tests: gives up its rights as the program does, tries one deed, and prints what came of it: `done`, or
//! the error. Arguments: the deed, what it is done to, and a command line of the program's; with the environment, that decides what is
//! left.
#![allow(unsafe_code)] // an intruder's calls have no safe wrapper

use std::error::Error;
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::libc;
use rustix::net::{SendFlags, SocketAddrUnix, send, sendto};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use starttls_wrapper::cli::{self, Invocation};
use starttls_wrapper::driver::{needs, ucspi};
use starttls_wrapper::sys::privileges;
use starttls_wrapper::sys::sandbox::{Confined, Needs, confine};

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args_os().skip(1);
    let mut word = || words.next().and_then(|word| word.into_string().ok()).ok_or("DEED OBJECT WORD...");
    let (deed, object) = (word()?, word()?);
    let Invocation::Serve(config) = cli::read(words, |name| std::env::var_os(name))? else {
        return Err("no session".into());
    };
    let (target, peer) = (ucspi::target(&config), ucspi::peer(&config));
    // It ends with us, however that is, and holds nothing of ours open.
    let mut child =
        Command::new("/bin/cat").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    privileges::harden()?;
    match &config.listen {
        None => {
            intrude(&needs::of_a_session(target.as_ref(), peer.as_ref(), vec![Pid::from_child(&child)]), &deed, &object)
        }
        // Its loops are threads; its children are a spawner's.
        Some(listen) => {
            let needs = needs::of_a_listener(target.as_ref(), None, peer.as_ref(), listen.proxies.is_some());
            std::thread::spawn(move || intrude(&needs, &deed, &object)).join().map_err(|_| "it panicked")?;
        }
    }
    // The one signal that is left for a session to send.
    kill_process(Pid::from_child(&child), Signal::KILL)?;
    child.wait()?;
    Ok(())
}

fn intrude(needs: &Needs, deed: &str, object: &str) {
    let confined = confine(needs);
    if confined != Confined::Wholly {
        println!("{confined:?}");
    }
    match attempt(deed, object) {
        Ok(()) => println!("done"),
        Err(error) => println!("{error}"),
    }
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
        "execute-mapped" => drop(map(libc::PROT_READ | libc::PROT_EXEC)?),
        "execute-written" => {
            let page = map(libc::PROT_READ | libc::PROT_WRITE)?;
            // SAFETY: the page is ours, and nobody else's.
            done(unsafe { libc::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_EXEC) }.into())?;
        }
        // SAFETY: it attaches, and touches no memory.
        "trace" => done(unsafe { libc::ptrace(libc::PTRACE_SEIZE, object.parse::<i32>()?, 0, 0) })?,
        // SAFETY: of no octet, to nowhere.
        "peek" => {
            done(unsafe { libc::process_vm_readv(object.parse()?, std::ptr::null(), 0, std::ptr::null(), 0, 0) } as i64)?
        }
        "run" => drop(Command::new(object).status()?),
        "become" => return Err(std::os::unix::process::CommandExt::exec(&mut Command::new(object)).into()),
        "signal" => test_kill_process(Pid::from_raw(object.parse()?).ok_or("no pid")?)?,
        "abort" => std::process::abort(),
        // SAFETY: it touches no memory of ours.
        "abort-another" => done(unsafe { libc::syscall(libc::SYS_tkill, object.parse::<i32>()?, libc::SIGABRT) })?,
        _ => return Err(format!("no deed {deed}").into()),
    }
    Ok(())
}

const PAGE: usize = 4096;

fn map(protection: i32) -> io::Result<*mut libc::c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: where the kernel likes.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(page) }
}

fn done(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
