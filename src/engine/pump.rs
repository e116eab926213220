//! One direction of the plaintext relay: octets go from one descriptor to another, spliced or copied.
//!
//! Client socket to child's stdin pipe, child's stdout pipe to client socket: one of the two is a pipe already, so splice
//! needs none of ours, and nothing is ever in flight inside this process. From socket to socket it goes through a pipe of ours
//! ([`Through`]). EAGAIN can mean "source empty", "sink full" or
//! "urgent mark"; it is not told apart. Any event on either end wakes the pump, which tries again: an edge that mattered is
//! never missed, and there is no poll(2) beside the loop's own.

use std::io;

use crate::session::policy::RelayMode;
use crate::sys::end::End;
use crate::sys::splice::{self, Spliced};

use super::through::Through;

/// Octets moved in one run before the rest of the connection has its turn.
const BUDGET: u64 = 1 << 20;

/// The buffer of a copying direction. Larger ones gained nothing that could be measured.
const COPY: usize = 64 * 1024;

/// A splice of this much is bulk, for which the pipe is grown.
pub(super) const BULK: usize = 32 * 1024;

/// Both directions of the plaintext relay.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) to_server: Pump,
    pub(super) to_client: Pump,
    /// The server's connection broke as it was written to. The kernel says so once: whoever reads then finds an end.
    pub(super) is_server_broken: bool,
}

impl Relay {
    pub(super) fn new(mode: RelayMode) -> Self {
        Self { to_server: Pump::new(mode), to_client: Pump::new(mode), is_server_broken: false }
    }
}

/// How a run ended.
#[derive(Debug)]
pub(super) enum Run {
    /// Nothing more can move now.
    Wait,
    /// The budget is used up.
    Again,
    /// The source has ended, and all that it gave is in the sink.
    Ended,
    /// The sink's reader is gone.
    SinkGone,
    /// The sink is a connection, and broke.
    SinkBroke,
    /// The source broke.
    SourceBroke,
    /// Neither is gone: the system could not do it.
    Failed(io::Error),
}

/// One direction.
#[derive(Debug)]
pub(super) struct Pump {
    mode: RelayMode,
    /// Something happened on either end since the last run.
    pub(super) is_awake: bool,
    is_grown: bool,
    through: Through,
    buffer: Vec<u8>,
    pending: core::ops::Range<usize>,
    /// Octets moved so far.
    pub(super) moved: u64,
}

impl Pump {
    pub(super) fn new(mode: RelayMode) -> Self {
        Self {
            mode,
            is_awake: true,
            is_grown: false,
            through: Through::default(),
            buffer: Vec::new(),
            pending: 0..0,
            moved: 0,
        }
    }

    /// Moves what can be moved. The ends are non-blocking; both are watched by the loop.
    pub(super) fn run(&mut self, source: &mut End, sink: &mut End) -> Run {
        if source.urgent {
            // splice stops before an urgent mark for ever; read passes over it (tcp(7)).
            self.mode = RelayMode::Copy;
        }
        self.is_awake = false;
        let start = self.moved;
        while self.moved - start < BUDGET {
            let run = match self.mode {
                RelayMode::Copy if !self.through.holds() => self.copy(source, sink),
                // What is in the pipe came before what would be copied.
                RelayMode::Splice | RelayMode::Copy => self.splice(source, sink),
            };
            if let Some(ended) = run {
                return ended;
            }
        }
        self.is_awake = true;
        Run::Again
    }

    fn splice(&mut self, source: &mut End, sink: &mut End) -> Option<Run> {
        if source.is_socket() && sink.is_socket() {
            return self.through.run(source, sink, &mut self.moved).unwrap_or_else(|_| {
                // No pipe can be had, and none is held.
                self.mode = RelayMode::Copy;
                None
            });
        }
        match splice::splice(&*source, &*sink) {
            Ok(Spliced::Moved(count)) => {
                self.moved += count as u64;
                if count >= BULK && !self.is_grown {
                    self.is_grown = true;
                    splice::grow(if sink.is_socket() { &*source } else { &*sink });
                }
                // A second look would cost as much as the first.
                source.is_drained_by(count).then_some(Run::Wait)
            }
            Ok(Spliced::End) => Some(Run::Ended),
            Ok(Spliced::WouldBlock) => Some(Run::Wait),
            Ok(Spliced::Unsupported) => {
                self.mode = RelayMode::Copy;
                source.readable = true;
                None
            }
            Err(error) if is_gone(sink, &error) => Some(gone(&error)),
            // splice doesn't say which of the two broke: it is the socket, a pipe only knows EPIPE.
            Err(error) if source.is_socket() && !is_systems(&error) => Some(Run::SourceBroke),
            Err(error) => Some(Run::Failed(error)),
        }
    }

    fn copy(&mut self, source: &mut End, sink: &mut End) -> Option<Run> {
        if self.pending.is_empty() {
            self.buffer.resize(COPY, 0);
            match source.read(&mut self.buffer) {
                Ok(None) => return Some(Run::Wait),
                Ok(Some(0)) => return Some(Run::Ended),
                Ok(Some(count)) => self.pending = 0..count,
                Err(_) => return Some(Run::SourceBroke),
            }
        }
        match sink.write(&self.buffer[self.pending.clone()]) {
            Ok(None) => Some(Run::Wait),
            Ok(Some(count)) => {
                self.moved += count as u64;
                self.pending.start += count;
                None
            }
            Err(error) if is_gone(sink, &error) => Some(gone(&error)),
            Err(error) => Some(Run::Failed(error)),
        }
    }
}

/// How, where [`is_gone`]: behind an end of the other side's own it is EPIPE.
pub(super) fn gone(error: &io::Error) -> Run {
    if error.kind() == io::ErrorKind::BrokenPipe { Run::SinkGone } else { Run::SinkBroke }
}

/// Whether a write that failed so says that nobody reads there any more. A pipe knows EPIPE alone; a connection breaks in many ways.
pub(super) fn is_gone(sink: &End, error: &io::Error) -> bool {
    !is_systems(error) && (sink.is_socket() || error.kind() == io::ErrorKind::BrokenPipe)
}

/// Whether neither end can be meant: there is no memory for it. (Of splice(2); to read and write no end has such an error.)
pub(super) fn is_systems(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::OutOfMemory
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::engine::CLIENT_IN;

    /// The two ends of a pipe.
    fn ends() -> (End, End) {
        let (from, to) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        (End::shared(from, CLIENT_IN).unwrap(), End::shared(to, CLIENT_IN).unwrap())
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_no_failure_of_the_system_and_any_other_error_is() {
        for mode in [RelayMode::Splice, RelayMode::Copy] {
            let ((mut source, mut feed), (reader, mut sink)) = (ends(), ends());
            feed.write(b"NOOP\r\n").unwrap();
            drop(reader);
            let run = Pump::new(mode).run(&mut source, &mut sink);
            assert!(matches!(run, Run::SinkGone), "{run:?}");
            feed.write(b"NOOP\r\n").unwrap();
            let (mut not_to_be_written, _to) = ends();
            let run = Pump::new(mode).run(&mut source, &mut not_to_be_written);
            assert!(matches!(run, Run::Failed(_)), "{run:?}");
        }
    }
}
