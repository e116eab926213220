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
    worker_of(count, 9, None)
}

/// The same with places for so many, who need PROGs if there is one to start them.
fn worker_of(count: usize, places: usize, spawner: Option<Spawner>) -> (Worker, Vec<SocketAddr>) {
    let sockets: Vec<OwnedFd> = (0..count).map(|_| listener::open("127.0.0.1:0".parse().unwrap()).unwrap()).collect();
    let address = |socket: &OwnedFd| rustix::net::getsockname(socket).unwrap().try_into().unwrap();
    let addresses = sockets.iter().map(address).collect();
    let sockets = sockets.into_iter().map(|socket| Listening { socket, is_shared: false }).collect();
    let stop = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let mut worker = Worker::new(House::bare_one(places), sockets, stop, spawner, Arc::default()).unwrap();
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

/// What its queue has no room for is this client's loss, and neither the others' nor the loop's.
#[test]
fn a_spawner_that_can_t_be_asked_just_now_is_a_421_for_who_needed_it_and_no_more() {
    const CLIENTS: usize = 40;
    let (spawner, other) = Spawner::played().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(spawner.as_fd(), 4096).unwrap();
    let (mut worker, addresses) = worker_of(1, CLIENTS, Some(spawner));
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| TcpStream::connect(addresses[0]).unwrap()).collect();
    let now = Instant::now();
    worker.accept(now);
    assert_eq!(worker.crowd.len(), CLIENTS);
    worker.crowd.drive(worker.poll.registry(), now);
    worker.order(now);
    let asked = worker.ordered.len();
    assert!((1..CLIENTS).contains(&asked), "{asked} have room");
    assert!(!worker.is_ending && worker.spawner.is_some(), "it is not lost");
    worker.crowd.drive(worker.poll.registry(), now);
    // The first ones wait; the others have heard why, in turn.
    for (number, client) in clients.iter_mut().enumerate() {
        client.set_nonblocking(number < asked).unwrap();
        let mut said = [0; 99];
        let count = std::io::Read::read(client, &mut said).unwrap_or_default();
        let wanted: &[u8] = if number < asked { b"" } else { b"421 4.3.0 Mail server not available\r\n" };
        assert_eq!(said[..count].escape_ascii().to_string(), wanted.escape_ascii().to_string(), "client {number}");
    }
    // They go, and are told of; the next one finds room again.
    clients.truncate(asked);
    let mut events = Events::with_capacity(2 * CLIENTS);
    while worker.crowd.len() > asked {
        worker.poll.poll(&mut events, Some(PATIENCE)).unwrap();
        assert!(!events.is_empty(), "{} are left", worker.crowd.len());
        events.iter().filter(|event| event.token().0 >= OTHERS).for_each(|event| worker.crowd.note(event));
        worker.crowd.drive(worker.poll.registry(), now);
    }
    let failed = worker.crowd.take_failed();
    assert_eq!(failed.len(), CLIENTS - asked);
    assert!(failed[0].contains("the spawner can't be asked"), "{}", failed[0]);
    let mut request = [0; 1024];
    while rustix::io::read(&other, &mut request).is_ok() {}
    let _next = TcpStream::connect(addresses[0]).unwrap();
    worker.ears[0].is_ready = true;
    worker.accept(now);
    worker.crowd.drive(worker.poll.registry(), now);
    worker.order(now);
    assert_eq!(worker.ordered.len(), asked + 1);
}

#[test]
fn who_waits_in_a_queue_of_our_own_when_all_ends_hears_so() {
    let (mut worker, addresses) = worker(2);
    let clients = addresses.iter().flat_map(|at| (0..AT_ONCE + 1).map(move |_| TcpStream::connect(at).unwrap()));
    let clients: Vec<_> = clients.collect();
    worker.end();
    for mut client in clients {
        let mut said = String::new();
        std::io::Read::read_to_string(&mut client, &mut said).unwrap();
        assert_eq!(said, "421 4.3.2 Service shutting down\r\n");
    }
}

#[test]
fn before_its_proxy_header_nobody_hears_of_the_end() {
    let (mut worker, addresses) = worker(1);
    Arc::get_mut(&mut worker.house).unwrap().proxies = Some(Vec::new());
    let mut client = TcpStream::connect(addresses[0]).unwrap();
    worker.end();
    assert_eq!(std::io::Read::read(&mut client, &mut [0; 9]).unwrap(), 0);
}

/// Nothing else wakes the loop: all clients have come, and are silent.
#[test]
fn who_can_t_be_asked_for_hears_so_at_once() {
    let (spawner, _other) = Spawner::played().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(spawner.as_fd(), 4096).unwrap();
    let (mut worker, addresses) = worker_of(1, 40, Some(spawner));
    let mut clients: Vec<_> = (0..40).map(|_| TcpStream::connect(addresses[0]).unwrap()).collect();
    worker.poll.poll(&mut Events::with_capacity(9), Some(Duration::ZERO)).unwrap();
    let (stage, stop) = (worker.house.stage.clone(), worker.stop.try_clone().unwrap());
    let runs = std::thread::spawn(move || worker.run());
    let last = clients.last_mut().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(9))).unwrap();
    let mut said = [0; 99];
    let count = std::io::Read::read(last, &mut said).unwrap_or_default();
    stage.store(Stage::End as u8, Ordering::Release);
    rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
    drop(clients);
    runs.join().unwrap().unwrap();
    assert_eq!(said[..count].escape_ascii().to_string(), r"421 4.3.0 Mail server not available\r\n");
}
