//! A thread that a bug of ours has ended is begun again. A loop's sessions are lost, which is said; its sockets are not, so that those who
//! come next are served. The other threads never notice. So it is with whoever probes and whoever answers for `--metrics`: without the
//! first what was learned would hold for ever, and nobody would see that the second is gone before he asks.
//!
//! A panic within one session ends that session alone ([`crate::engine::Crowd`]) and never comes here.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use log::error;
use rustix::event::{Timespec, poll};

/// Between two beginnings: a bug that comes with the beginning must not take a processor for itself.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs `this` to its end, as often as it takes; `what` a bug ends with it, for the log.
///
/// # Errors
/// Those of the end, or it can't be begun again.
pub(super) fn serve<L>(
    what: &str,
    mut this: L,
    mut run: impl FnMut(&mut L) -> io::Result<()>,
    mut anew: impl FnMut(L) -> io::Result<L>,
) -> io::Result<()> {
    loop {
        if let Ok(ended) = catch_unwind(AssertUnwindSafe(|| run(&mut this))) {
            return ended;
        }
        error!("a bug of ours has ended {what}: it is begun again");
        // Sleeping is no system call of a loop's; waiting for nothing is.
        let _ = poll(&mut [], Some(&Timespec::try_from(PAUSE).unwrap_or_default()));
        this = anew(this)?;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::io::Read;
    use std::net::{SocketAddr, TcpStream};
    use std::sync::atomic::Ordering;
    use std::sync::{Arc, Mutex};
    use std::thread;
    use std::time::Instant;

    use rustix::event::{EventfdFlags, eventfd};

    use super::super::worker::{House, Stage, Worker};
    use super::*;
    use crate::engine::meter::Count;
    use crate::sys::listener::{self, Listening};

    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

    struct Lines;

    impl log::Log for Lines {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            LINES.lock().unwrap().push(format!("{}: {}", record.level(), record.args()));
        }
        fn flush(&self) {}
    }

    #[test]
    fn what_panics_is_told_and_begun_again_and_what_ends_is_not() {
        log::set_logger(&Lines).unwrap();
        log::set_max_level(log::LevelFilter::Error);
        let mut runs = 0;
        let outcome = serve(
            "seven",
            7,
            |number| {
                runs += 1;
                assert!(runs > 1, "provoked by {number}");
                Err(io::Error::other(format!("end of {number}")))
            },
            |number| Ok(number + 1),
        );
        assert_eq!((outcome.unwrap_err().to_string(), runs), ("end of 8".to_owned(), 2));
        let told = "ERROR: a bug of ours has ended seven: it is begun again";
        assert!(LINES.lock().unwrap().iter().any(|line| line == told));
        let lost = serve("seven", 7, |_| panic!("provoked"), |_| Err(io::Error::other("no descriptor")));
        assert_eq!(lost.unwrap_err().to_string(), "no descriptor");
    }

    fn until(what: &str, is_so: impl Fn() -> bool) {
        let due = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < due, "{what}");
            thread::yield_now();
        }
    }

    /// A loop, and where it listens.
    fn begin(house: &Arc<House>) -> (Worker, SocketAddr) {
        let socket = listener::open("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = rustix::net::getsockname(&socket).unwrap().try_into().unwrap();
        let ears = vec![Listening { socket, is_shared: false }];
        let stop = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        (Worker::new(house.clone(), ears, stop, None, Arc::default()).unwrap(), address)
    }

    #[test]
    fn a_loop_that_a_bug_has_ended_serves_those_who_come_next_and_another_never_notices() {
        let house = House::bare_one(9);
        let [(worker, address), (second, another)] = [(); 2].map(|()| begin(&house));
        let (bug, meter) = (worker.bug.clone(), worker.meter.clone());
        let [stop, stop_second] = [&worker, &second].map(|one| one.stop.try_clone().unwrap());
        let ended = [worker, second].map(|one| thread::spawn(move || serve("a loop", one, Worker::run, Worker::anew)));

        let [mut first, other] = [address, another].map(|at| TcpStream::connect(at).unwrap());
        until("the first two are not served", || house.admission.taken() == 2);
        bug.store(true, Ordering::Relaxed);
        // Not by who comes next: it may be accepted before the bug has its turn, and is then lost too.
        rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
        assert_eq!(first.read(&mut [0]).unwrap(), 0, "its session is lost");
        let next = [(); 2].map(|()| TcpStream::connect(address).unwrap());
        until("those who come next are not served", || house.admission.taken() == 3);
        house.stage.store(Stage::End as u8, Ordering::Release);
        for stop in [stop, stop_second] {
            rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
        }
        for mut client in next.into_iter().chain([other]) {
            let mut said = String::new();
            client.read_to_string(&mut said).unwrap();
            assert_eq!(said, "421 4.3.2 Service shutting down\r\n");
        }
        assert!(ended.into_iter().all(|loops| loops.join().unwrap().is_ok()));
        assert_eq!(house.admission.taken(), 0);
        let at_present: u64 = meter.states.iter().map(Count::value).sum();
        let ended: u64 = meter.ended.iter().map(Count::value).sum();
        assert_eq!((meter.restarts.value(), meter.begun.value(), ended, at_present), (1, 3, 3, 0));
    }
}
