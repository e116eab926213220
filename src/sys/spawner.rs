//! Starting PROG from a process that has given up the right to: a small process, forked before that, does it on request.
//!
//! Contract: single-threaded at the fork, and no secret read yet. The spawner never hears an octet of a client's: a request is the
//! variables of one, made by us from addresses, at most 1024 octets; the answer is PROG's pid, our ends of its two pipes, and a
//! leash. Over the leash its exit status comes, and the signal goes that it is to get; closing it leaves PROG alone, which sees the end of its
//! input. The spawner ends when all who may ask are gone, and PROGs are reaped. It outlives the signals that a terminal or systemd sends to
//! all, since sessions that end in peace may need it; and of what was open at the fork it has nothing, or a socket that listens would
//! outlive the program. Who asks for much takes turns with the others: one request of each, and then a look at all PROGs.
//!
//! Rejected: a fork of the process that faces the network, for each PROG. It would hand down its sandbox, and cost as much as its memory.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::cmsg_space;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Rlimit};

use super::child::{self, Child};
use super::{privileges, raw};
use crate::error::exit;

/// The longest request or answer, in octets.
const MOST: usize = 1024;

/// When what could not be said is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// On the leash: end, please; and: end.
const TERMINATE: &[u8] = b"T";
const KILL: &[u8] = b"K";

/// What is started, and as whom.
#[derive(Debug)]
pub struct Order<'a> {
    /// PROG, found through PATH.
    pub program: &'a OsStr,
    /// ARGS.
    pub arguments: &'a [OsString],
    /// The variables that it must not find.
    pub own: &'a [&'a str],
    /// The ids that it gets, where some are given.
    pub ids: (Option<u32>, Option<u32>),
    /// The limit of open descriptors that it gets, where ours is another: the spawner needs that itself.
    pub descriptors: Option<Rlimit>,
}

/// One who may ask the spawner. What is asked is answered in turn.
#[derive(Debug)]
pub struct Spawner(OwnedFd);

impl Spawner {
    /// Forks the spawner, for so many who will ask, and waits until it stands: it has its ids, and hears them.
    ///
    /// # Errors
    /// The system has no process or socket left, or the spawner can't stand: its own error, of which it says nothing itself.
    pub fn start(order: &Order<'_>, count: usize) -> io::Result<Vec<Self>> {
        let pairs = (0..count).map(|_| pair()).collect::<io::Result<Vec<_>>>()?;
        let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let (outcome, teller) = pipe_with(PipeFlags::CLOEXEC)?;
        match raw::fork()? {
            Some(_) => {
                drop(teller);
                hear(&outcome).map(|()| ours.into_iter().map(Self).collect())
            }
            None => {
                drop((ours, outcome));
                let shop = become_spawner(theirs, order, &teller);
                let told = tell(&teller, shop.as_ref().err());
                drop(teller);
                // Of what keeps it from standing the other process speaks.
                let Ok(shop) = shop else { raw::exit_now(exit::SYSTEM) };
                let code = match told.and_then(|()| serve(shop, order)) {
                    Ok(()) => exit::OVER,
                    Err(error) => {
                        let why =
                            format!("starttls-wrapper: the spawner of {} ends: {error}\n", order.program.display());
                        let _ = rustix::io::write(rustix::stdio::stderr(), why.as_bytes());
                        exit::SYSTEM
                    }
                };
                raw::exit_now(code)
            }
        }
    }

    /// One whose other end a test plays.
    #[cfg(test)]
    pub(crate) fn played() -> io::Result<(Self, OwnedFd)> {
        pair().map(|(ours, theirs)| (Self(ours), theirs))
    }

    /// Asks for a PROG with these variables.
    ///
    /// # Errors
    /// The spawner is gone, or can't be asked just now ([`passes`]).
    pub fn ask<'a>(&self, variables: impl Iterator<Item = (&'a str, String)>) -> io::Result<()> {
        let mut octets = Vec::with_capacity(MOST);
        for (name, value) in variables {
            octets.extend_from_slice(format!("{name}={value}\0").as_bytes());
        }
        retry_on_intr(|| rustix::io::write(&self.0, &octets))?;
        Ok(())
    }

    /// The next answer, if it is there: PROG, or why it can't be started.
    ///
    /// # Errors
    /// The spawner is gone.
    pub fn answer(&self) -> io::Result<Option<Result<Child, String>>> {
        let (mut octets, mut room) = ([0; MOST], [MaybeUninit::uninit(); cmsg_space!(ScmRights(3))]);
        let mut ancillary = RecvAncillaryBuffer::new(&mut room);
        let mut into = [IoSliceMut::new(&mut octets)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let count = match retry_on_intr(|| recvmsg(&self.0, &mut into, &mut ancillary, flags)) {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let rights = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let descriptors: Vec<OwnedFd> = rights.flatten().collect();
        let said = octets.get(..count).filter(|said| !said.is_empty()).ok_or(io::ErrorKind::UnexpectedEof)?;
        let pid = said.first_chunk().map(|pid| i32::from_ne_bytes(*pid)).and_then(Pid::from_raw);
        Ok(Some(match (pid, <[OwnedFd; 3]>::try_from(descriptors)) {
            (Some(pid), Ok([stdin, stdout, leash])) => Ok(Child::on_leash(pid, stdin, stdout, leash)),
            (Some(_), Err(_)) => Err("no descriptor left for its pipes".to_owned()),
            (None, _) => Err(String::from_utf8_lossy(&said[size_of::<i32>().min(count)..]).into_owned()),
        }))
    }
}

impl AsFd for Spawner {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether it is of the moment: a queue is full, or the kernel short of memory. Who is not heard then may be later.
#[must_use]
pub fn passes(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::INTR))
}

/// The exit status, if it has come over the leash.
///
/// # Errors
/// The spawner is gone, and nobody will ever know.
pub(super) fn exit_status(leash: &OwnedFd) -> io::Result<Option<std::process::ExitStatus>> {
    let mut octets = [0; size_of::<i32>()];
    match retry_on_intr(|| rustix::io::read(leash, &mut octets)) {
        Ok(count) if count == octets.len() => Ok(Some(ExitStatusExt::from_raw(i32::from_ne_bytes(octets)))),
        Ok(_) => Err(io::Error::other("its spawner is gone")),
        Err(Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Has the spawner signal it.
///
/// # Errors
/// The spawner is gone.
pub(super) fn signal(leash: &OwnedFd, forcibly: bool) -> io::Result<()> {
    rustix::io::write(leash, if forcibly { KILL } else { TERMINATE })?;
    Ok(())
}

/// Tells whether the spawner stands: by the number of the error that keeps it from that, or 0.
fn tell(teller: &OwnedFd, error: Option<&io::Error>) -> io::Result<()> {
    let number = error.map_or(0, |error| error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()));
    retry_on_intr(|| rustix::io::write(teller, &number.to_ne_bytes()))?;
    Ok(())
}

fn hear(outcome: &OwnedFd) -> io::Result<()> {
    let mut number = [0; size_of::<i32>()];
    match retry_on_intr(|| rustix::io::read(outcome, &mut number))? {
        count if count < number.len() => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => match i32::from_ne_bytes(number) {
            0 => Ok(()),
            number => Err(io::Error::from_raw_os_error(number)),
        },
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// A PROG that runs.
struct Kept {
    child: Child,
    _exit: OwnedFd,
    leash: Option<OwnedFd>,
}

/// One who asks: what it has sent is told once, and remembered here.
struct Asker {
    socket: OwnedFd,
    is_ready: bool,
    /// The word that its last request has failed, which could not be sent yet: answers come in turn.
    owed: Option<Vec<u8>>,
}

/// In the new process: what it needs, and nothing else.
fn become_spawner(askers: Vec<OwnedFd>, order: &Order<'_>, teller: &OwnedFd) -> io::Result<Shop> {
    let _ = (rustix::process::setpgid(None, None), rustix::thread::set_name(c"spawner"));
    raw::keep_only(&askers.iter().chain([teller]).map(AsFd::as_fd).collect::<Vec<_>>());
    raw::outlive_terminations()?;
    privileges::become_user(order.ids.0, order.ids.1)?;
    Shop::new(askers)
}

/// Serves until nobody can ask any more.
fn serve(mut shop: Shop, order: &Order<'_>) -> io::Result<()> {
    while !shop.is_over() {
        shop.pass(order)?;
    }
    Ok(())
}

/// What the spawner has to look after.
struct Shop {
    poll: Poll,
    events: Events,
    askers: Vec<Option<Asker>>,
    kept: HashMap<usize, Kept>,
    next: usize,
}

impl Shop {
    fn new(askers: Vec<OwnedFd>) -> io::Result<Self> {
        let poll = Poll::new()?;
        for (number, asker) in askers.iter().enumerate() {
            watch(&poll, asker, Token(number))?;
        }
        let (next, events) = (askers.len(), Events::with_capacity(64));
        let askers = askers.into_iter().map(|socket| Some(Asker { socket, is_ready: false, owed: None })).collect();
        Ok(Self { poll, events, askers, kept: HashMap::new(), next })
    }

    fn is_over(&self) -> bool {
        self.askers.iter().all(Option::is_none) && self.kept.is_empty()
    }

    /// Waits until there is something to do, looks at the PROGs of which there is news, and takes one request of each who has one.
    fn pass(&mut self, order: &Order<'_>) -> io::Result<()> {
        let asking = self.askers.iter().flatten().filter(|asker| asker.is_ready);
        let patience = asking.map(|asker| if asker.owed.is_some() { AGAIN } else { Duration::ZERO }).min();
        match self.poll.poll(&mut self.events, patience) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in &self.events {
            let number = event.token().0;
            if let Some(asker) = self.askers.get_mut(number) {
                asker.iter_mut().for_each(|asker| asker.is_ready = true);
            } else if self.kept.get_mut(&number).is_some_and(tend) {
                self.kept.remove(&number);
            }
        }
        for place in &mut self.askers {
            let Some(asker) = place.as_mut().filter(|asker| asker.is_ready) else { continue };
            match take_order(asker, order, &self.poll, self.next) {
                Ok(Taken::Nothing) => asker.is_ready = false,
                Ok(Taken::Started(new)) => {
                    self.kept.insert(self.next, new);
                }
                Ok(Taken::Failed) => {}
                Err(_) => *place = None,
            }
            self.next += 1;
        }
        Ok(())
    }
}

fn watch(poll: &Poll, descriptor: &OwnedFd, token: Token) -> io::Result<()> {
    poll.registry().register(&mut SourceFd(&descriptor.as_raw_fd()), token, Interest::READABLE)
}

enum Taken {
    Nothing,
    Started(Kept),
    Failed,
}

/// Takes one request and answers it. An error: the asker is gone.
fn take_order(asker: &mut Asker, order: &Order<'_>, poll: &Poll, number: usize) -> io::Result<Taken> {
    if let Some(why) = asker.owed.take() {
        return refuse(asker, why);
    }
    let mut octets = [0; MOST];
    let count = match retry_on_intr(|| rustix::io::read(&asker.socket, &mut octets)) {
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => count,
        // Nothing else may end the reading: what is there is told once.
        Err(Errno::AGAIN) => return Ok(Taken::Nothing),
        Err(error) => return Err(error.into()),
    };
    let started = start(&octets[..count], order).and_then(|mut child| {
        let (ours, theirs) = pair()?;
        let exit = child.exit_event()?;
        watch(poll, &exit, Token(number))?;
        watch(poll, &ours, Token(number))?;
        let pipes = child.stdin.take().zip(child.stdout.take()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok((Kept { child, _exit: exit, leash: Some(ours) }, pipes, theirs))
    });
    // What can't be sent is this client's loss alone; an asker that is gone is found out by the word for it.
    let sent = started.and_then(|(kept, (stdin, stdout), leash)| {
        let descriptors = [stdin.as_fd(), stdout.as_fd(), leash.as_fd()];
        let mut room = [MaybeUninit::uninit(); cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut room);
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let pid = kept.child.pid().as_raw_nonzero().get().to_ne_bytes();
        retry_on_intr(|| sendmsg(&asker.socket, &[IoSlice::new(&pid)], &mut ancillary, SendFlags::NOSIGNAL))?;
        Ok(kept)
    });
    match sent {
        Ok(kept) => Ok(Taken::Started(kept)),
        Err(error) => {
            let mut why = 0_i32.to_ne_bytes().to_vec();
            why.extend(error.to_string().bytes().take(MOST - why.len()));
            refuse(asker, why)
        }
    }
}

/// Says why there is no PROG; if that can't be said now, later.
fn refuse(asker: &mut Asker, why: Vec<u8>) -> io::Result<Taken> {
    match retry_on_intr(|| rustix::io::write(&asker.socket, &why)).map_err(io::Error::from) {
        Ok(_) => {}
        Err(error) if passes(&error) => asker.owed = Some(why),
        Err(error) => return Err(error),
    }
    Ok(Taken::Failed)
}

/// PROG, with what the request says of its client.
fn start(request: &[u8], order: &Order<'_>) -> io::Result<Child> {
    let text = str::from_utf8(request).map_err(io::Error::other)?;
    let variables = text.split('\0').filter_map(|word| word.split_once('='));
    let mut command = child::command(order.program, order.arguments, order.own);
    command.envs(variables);
    if let Some(limit) = order.descriptors {
        raw::limit_descriptors(&mut command, limit);
    }
    Child::spawn(command)
}

/// Looks at a PROG and its leash. True: it has ended, and that is said.
fn tend(kept: &mut Kept) -> bool {
    let mut word = [0; 1];
    while let Some(leash) = &kept.leash {
        match rustix::io::read(leash, &mut word) {
            Ok(0) => kept.leash = None,
            Ok(_) => {
                let _ = kept.child.kill(word == KILL);
            }
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(_) => kept.leash = None,
        }
    }
    match kept.child.try_reap() {
        Ok(None) => false,
        Ok(Some(status)) => {
            if let Some(leash) = &kept.leash {
                let _ = rustix::io::write(leash, &status.into_raw().to_ne_bytes());
            }
            true
        }
        Err(_) => true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The spawner's rooms, and who asks there for PROGs.
    fn shop(count: usize) -> (Shop, Vec<Spawner>) {
        let (ours, theirs) = (0..count).map(|_| pair().unwrap()).unzip::<_, _, Vec<_>, Vec<_>>();
        (Shop::new(theirs).unwrap(), ours.into_iter().map(Spawner).collect())
    }

    fn nothing() -> Order<'static> {
        Order {
            program: OsStr::new("/no/such/program"),
            arguments: &[],
            own: &[],
            ids: (None, None),
            descriptors: None,
        }
    }

    fn asked(spawner: &Spawner) -> io::Result<()> {
        spawner.ask(std::iter::once(("PROTO", "TCP".to_owned())))
    }

    fn answers(spawner: &Spawner) -> usize {
        std::iter::from_fn(|| spawner.answer().unwrap()).count()
    }

    #[test]
    fn who_asks_for_much_takes_turns_with_who_asks_for_little() {
        let (mut shop, askers) = shop(2);
        (0..5).for_each(|_| asked(&askers[0]).unwrap());
        asked(&askers[1]).unwrap();
        shop.pass(&nothing()).unwrap();
        assert_eq!([0, 1].map(|number| answers(&askers[number])), [1, 1]);
        (0..4).for_each(|_| shop.pass(&nothing()).unwrap());
        assert_eq!(
            [0, 1].map(|number| answers(&askers[number])),
            [4, 0],
            "what is left is taken without being told again"
        );
    }

    #[test]
    fn a_full_queue_is_of_the_moment_and_no_answer_is_lost_in_it() {
        let (mut shop, askers) = shop(1);
        rustix::net::sockopt::set_socket_send_buffer_size(&shop.askers[0].as_ref().unwrap().socket, 1).unwrap();
        // Room for more requests than answers, and not for hundreds: each that is owed takes its time.
        rustix::net::sockopt::set_socket_send_buffer_size(&askers[0], 8192).unwrap();
        let mut count = 0;
        let full = loop {
            match asked(&askers[0]) {
                Ok(()) => count += 1,
                Err(error) => break error,
            }
        };
        assert!(passes(&full), "{full}");
        let is_ready = |shop: &Shop| shop.askers[0].as_ref().is_some_and(|asker| asker.is_ready);
        shop.pass(&nothing()).unwrap();
        for _ in 0..count {
            if is_ready(&shop) {
                shop.pass(&nothing()).unwrap();
            }
        }
        assert!(is_ready(&shop), "its queue is not full");
        let mut total = 0;
        for _ in 0..2 * count {
            total += answers(&askers[0]);
            if is_ready(&shop) {
                shop.pass(&nothing()).unwrap();
            }
        }
        assert_eq!(total, count);
        drop(askers);
        shop.pass(&nothing()).unwrap();
        assert!(shop.is_over());
        assert!(!passes(&io::ErrorKind::UnexpectedEof.into()) && !passes(&Errno::PIPE.into()));
    }
}
