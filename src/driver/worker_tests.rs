//! A loop and its listening sockets, without a process around it.

#![allow(clippy::unwrap_used)]

use std::net::TcpStream;

use rustix::event::{EventfdFlags, eventfd};

use super::*;

impl House {
    /// One that needs nothing, has places for so many, and says nothing but 421.
    pub(in crate::driver) fn bare_one(places: usize) -> Arc<Self> {
        Arc::new(Self {
            policy: Arc::default(),
            bare: Arc::default(),
            brief: Default::default(),
            setups: Arc::default(),
            target: None,
            send_proxy: None,
            relay: RelayMode::Splice,
            plain: None,
            learned: Arc::new(Shared::new().unwrap()),
            program: "nobody".to_owned(),
            proxies: None,
            admission: Admission::new(places, None),
            stage: Arc::new(AtomicU8::new(Stage::Serve as u8)),
        })
    }
}

/// A loop with these sockets, which have something for it, and the other ends: where they listen.
fn worker(count: usize) -> (Worker, Vec<SocketAddr>) {
    let sockets: Vec<OwnedFd> = (0..count).map(|_| listener::open("127.0.0.1:0".parse().unwrap()).unwrap()).collect();
    let address = |socket: &OwnedFd| rustix::net::getsockname(socket).unwrap().try_into().unwrap();
    let addresses = sockets.iter().map(address).collect();
    let sockets = sockets.into_iter().map(|socket| Listening { socket, is_shared: false }).collect();
    let stop = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let mut worker = Worker::new(House::bare_one(9), sockets, stop, None, Arc::default()).unwrap();
    worker.ears.iter_mut().for_each(|ear| ear.is_ready = true);
    (worker, addresses)
}

#[test]
fn a_socket_that_is_flooded_takes_turns_with_the_others() {
    let (mut worker, addresses) = worker(2);
    let _flood: Vec<_> = (0..AT_ONCE + 1).map(|_| TcpStream::connect(addresses[0]).unwrap()).collect();
    let _other = TcpStream::connect(addresses[1]).unwrap();
    assert!(worker.accept(Instant::now()), "there is one left");
    assert_eq!(worker.meter.accepted.value(), AT_ONCE as u64 + 1);
    assert_eq!([0, 1].map(|number: usize| worker.ears[number].is_ready), [true, false]);
    assert!(!worker.accept(Instant::now()));
    assert_eq!(worker.meter.accepted.value(), AT_ONCE as u64 + 2);
}

#[test]
fn a_socket_that_somebody_has_shut_down_pauses_and_costs_the_others_nothing() {
    let (mut worker, addresses) = worker(2);
    rustix::net::shutdown(&worker.ears[0].listening.socket, rustix::net::Shutdown::Both).unwrap();
    let now = Instant::now();
    for (passed, accepted, pauses) in [(0, 1, 1), (1, 2, 1), (100, 3, 2)] {
        let _client = TcpStream::connect(addresses[1]).unwrap();
        worker.ears[1].is_ready = true;
        assert!(!worker.accept(now + Duration::from_millis(passed)));
        assert_eq!((worker.meter.accepted.value(), worker.meter.pauses.value()), (accepted, pauses), "{passed} ms");
    }
}
