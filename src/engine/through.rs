//! From socket to socket by splice, through a pipe that is borrowed: a direction has one only while octets are in it.
//!
//! The pipes of a thread are shared by all its connections: an idle relay holds none, and a loop has about as many as there are
//! receivers that take less than they are sent. Only an empty one is ever given back, or octets would cross from session to session;
//! how much is in it is counted and never guessed: EAGAIN says "nothing there" or "no room", and a pipe's room is in slots, not
//! octets. A direction that is dropped closes what it holds.
//!
//! Rejected: a pair for each relay, from its begin to its end. Four descriptors more for each idle session, and two pipe2(2) and four
//! close(2) for each.

use core::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;

use rustix::pipe::PipeFlags;

use crate::sys::end::End;
use crate::sys::splice::{self, Spliced};

use super::pump::{BULK, Run, gone, is_systems};

/// Empty pipes that a thread keeps: it drives one connection at a time, which has two directions.
pub const SPARE_PIPES: usize = 4;

thread_local! {
    static SPARES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
    is_grown: bool,
}

impl Pipe {
    /// An empty one.
    fn borrow() -> io::Result<Self> {
        if let Some(spare) = SPARES.with_borrow_mut(Vec::pop) {
            return Ok(spare);
        }
        let (from, to) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { from, to, is_grown: false })
    }

    /// Nothing is in it.
    fn give_back(self) {
        SPARES.with_borrow_mut(|spares| {
            if spares.len() < SPARE_PIPES {
                spares.push(self);
            }
        });
    }
}

/// One direction between two sockets.
#[derive(Debug, Default)]
pub(super) struct Through {
    /// The pipe, and how much is in it, which is not nothing.
    held: Option<(Pipe, usize)>,
    has_ended: bool,
    /// What is held was all that there was, and leaves at once.
    is_drained: bool,
}

impl Through {
    /// Whether octets are on the way.
    pub(super) fn holds(&self) -> bool {
        self.held.is_some()
    }

    /// One turn: what is held leaves, or more is taken. `None`: there may be more to do.
    ///
    /// # Errors
    /// There is no pipe to be had. Nothing was taken.
    pub(super) fn run(&mut self, source: &mut End, sink: &mut End, moved: &mut u64) -> io::Result<Option<Run>> {
        if let Some((pipe, held)) = self.held.take() {
            return Ok(self.emit(pipe, held, sink, moved));
        }
        if self.has_ended {
            return Ok(Some(Run::Ended));
        }
        Ok(self.take(Pipe::borrow()?, source))
    }

    fn emit(&mut self, pipe: Pipe, held: usize, sink: &End, moved: &mut u64) -> Option<Run> {
        match splice::splice(&pipe.from, sink) {
            Ok(Spliced::Moved(count)) => {
                *moved += count as u64;
                if count < held {
                    self.is_drained = false;
                    self.held = Some((pipe, held - count));
                    return None;
                }
                pipe.give_back();
                // A second look would cost as much as the first.
                self.is_drained.then_some(Run::Wait)
            }
            Ok(Spliced::WouldBlock) => {
                // By the time it leaves more may have come, whose edge finds the sink full.
                self.is_drained = false;
                self.held = Some((pipe, held));
                Some(Run::Wait)
            }
            // Of a pipe that is not empty and a socket: the socket takes nothing more.
            Ok(Spliced::End | Spliced::Unsupported) => Some(Run::SinkGone),
            Err(error) if is_systems(&error) => Some(Run::Failed(error)),
            Err(error) => Some(gone(&error)),
        }
    }

    fn take(&mut self, mut pipe: Pipe, source: &End) -> Option<Run> {
        let run = match splice::splice(source, &pipe.to) {
            Ok(Spliced::Moved(count)) => {
                self.is_drained = source.is_drained_by(count);
                if count >= BULK && !pipe.is_grown {
                    pipe.is_grown = true;
                    splice::grow(&pipe.to);
                }
                self.held = Some((pipe, count));
                return None;
            }
            Ok(Spliced::End) => {
                self.has_ended = true;
                None
            }
            Ok(Spliced::WouldBlock) => Some(Run::Wait),
            Err(error) if is_systems(&error) => Some(Run::Failed(error)),
            Ok(Spliced::Unsupported) | Err(_) => Some(Run::SourceBroke),
        };
        pipe.give_back();
        run
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::engine::CLIENT_IN;
    use crate::engine::pump::Pump;
    use crate::session::policy::RelayMode;

    fn spares() -> usize {
        SPARES.with_borrow(Vec::len)
    }

    /// Somebody's socket, and our end of the connection.
    fn connection() -> (TcpStream, End) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        (theirs, End::socket(ours.into(), CLIENT_IN))
    }

    /// Runs until nothing moves.
    fn pump(through: &mut Through, source: &mut End, sink: &mut End) -> Run {
        let mut moved = 0;
        loop {
            if let Some(run) = through.run(source, sink, &mut moved).unwrap() {
                return run;
            }
        }
    }

    #[test]
    fn a_pipe_is_held_only_while_something_is_in_it_and_only_an_empty_one_comes_back() {
        let (mut client, mut source) = connection();
        let (mut server, mut sink) = connection();
        let mut through = Through::default();
        assert!(matches!(pump(&mut through, &mut source, &mut sink), Run::Wait));
        assert_eq!((through.held.is_some(), spares()), (false, 1), "nothing came");

        client.write_all(b"DATA\r\n").unwrap();
        pump(&mut through, &mut source, &mut sink);
        let mut got = [0; 6];
        server.read_exact(&mut got).unwrap();
        assert_eq!((&got, through.held.is_some(), spares()), (b"DATA\r\n", false, 1));

        // A server that reads nothing: its socket fills, then the pipe.
        client.set_nonblocking(true).unwrap();
        let block = [b'x'; 64 * 1024];
        let mut given = 0;
        while through.held.is_none() {
            while let Ok(count) = client.write(&block) {
                given += count;
            }
            pump(&mut through, &mut source, &mut sink);
            assert!(given < 1 << 30, "where is it?");
        }
        assert_eq!(spares(), 0);
        // Another direction has another pipe meanwhile.
        let (mut other, mut second) = connection();
        let (mut reader, mut drain) = connection();
        let mut beside = Through::default();
        other.write_all(b"QUIT\r\n").unwrap();
        pump(&mut beside, &mut second, &mut drain);
        reader.read_exact(&mut got).unwrap();
        assert_eq!((&got, spares()), (b"QUIT\r\n", 1));

        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            server.read_to_end(&mut all).unwrap();
            all
        });
        drop(client);
        while !matches!(pump(&mut through, &mut source, &mut sink), Run::Ended) {
            rustix::event::poll(&mut [rustix::event::PollFd::new(&sink, rustix::event::PollFlags::OUT)], None).unwrap();
        }
        assert_eq!(spares(), 2);
        drop(sink);
        let all = reading.join().unwrap();
        assert!(all.len() == given && all.iter().all(|octet| *octet == b'x'), "{} of {given}", all.len());

        // What is dropped with octets in it is closed.
        let (mut client, mut source) = connection();
        let (_server, mut sink) = connection();
        client.set_nonblocking(true).unwrap();
        let mut through = Through::default();
        while through.held.is_none() {
            while client.write(&block).is_ok() {}
            pump(&mut through, &mut source, &mut sink);
        }
        drop(through);
        assert_eq!(spares(), 1);
    }

    /// A source and a sink that takes nothing more, with both peers, and what the sink's has to read first.
    fn dammed() -> (TcpStream, End, TcpStream, End, Vec<u8>) {
        let (client, source) = connection();
        let (server, mut sink) = connection();
        let mut before = 0;
        while let Some(count) = sink.write(&[b'-'; 64 * 1024]).unwrap() {
            before += count;
        }
        (client, source, server, sink, vec![0; before])
    }

    #[test]
    fn what_came_while_the_sink_was_full_needs_no_event_of_its_own() {
        let (mut client, mut source, mut server, mut sink, mut before) = dammed();
        let mut through = Through::default();
        client.write_all(&[b'1'; 1000]).unwrap();
        assert!(matches!(pump(&mut through, &mut source, &mut sink), Run::Wait));
        assert!(through.holds());
        client.write_all(&[b'2'; 1000]).unwrap();
        // Its edge finds no room.
        pump(&mut through, &mut source, &mut sink);
        server.read_exact(&mut before).unwrap();
        // And the sink's is the last one.
        pump(&mut through, &mut source, &mut sink);
        server.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        let mut got = [0; 2000];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, *[[b'1'; 1000], [b'2'; 1000]].concat());
    }

    #[test]
    fn what_is_held_leaves_before_what_is_copied_behind_an_urgent_mark() {
        let (mut client, mut source, mut server, mut sink, mut before) = dammed();
        let mut pump = Pump::new(RelayMode::Splice);
        client.write_all(&[b'1'; 1000]).unwrap();
        assert!(matches!(pump.run(&mut source, &mut sink), Run::Wait));
        (source.urgent, source.readable) = (true, true);
        client.write_all(&[b'2'; 1000]).unwrap();
        assert!(matches!(pump.run(&mut source, &mut sink), Run::Wait));
        server.read_exact(&mut before).unwrap();
        sink.writable = true;
        assert!(matches!(pump.run(&mut source, &mut sink), Run::Wait));
        server.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        let mut got = [0; 2000];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, *[[b'1'; 1000], [b'2'; 1000]].concat());
    }
}
