//! Clients that send without end: what that costs.

use std::io::Write;
use std::time::{Duration, Instant};

use rustls::Connection;

use crate::door::Start;
use crate::steps::{At, Standing, all_of};

/// The most that a client can have us hold, in KiB.
const MOST: u64 = 2048;

/// `octets` as records of `tls`.
fn records(tls: &mut Connection, octets: &[u8]) -> Vec<u8> {
    let mut records = Vec::new();
    tls.writer().write_all(octets).unwrap();
    while tls.wants_write() {
        tls.write_tls(&mut records).unwrap();
    }
    records
}

#[test]
fn a_client_that_floods_the_gate_and_never_reads_is_not_read_either() {
    all_of(&["\n", "MAIL\n", "XCLIENT\n", "NOOP\n"], |line| {
        let mut standing = Standing::at(At::Gate, &Start::default());
        let memory = standing.door.memory("VmHWM");
        let client = standing.door.client.as_mut().unwrap();
        let flood = line.repeat(16_000 / line.len());
        let mut sent = 0;
        'flood: while sent < 64 << 20 {
            let records = records(client.tls().unwrap(), flood.as_bytes());
            let mut rest = &records[..];
            while !rest.is_empty() {
                let taken = client.send_some(rest);
                rest = &rest[taken..];
                sent += taken;
                let soon = Instant::now() + Duration::from_millis(300);
                if taken == 0 && !client.stream().wait(false, true, soon) {
                    break 'flood;
                }
            }
        }
        let grown = standing.door.memory("VmHWM") - memory;
        assert!(grown < MOST, "{grown} KiB more");
        assert!(sent < 64 << 20, "the flood never stops");
        standing.door.client.take().unwrap().reset();
        assert_eq!(standing.close(), 1);
    });
}

#[test]
fn what_follows_the_clients_close_notify_costs_nothing_and_keeps_nothing_alive() {
    let options = ["--relay-timeout", "2"];
    let mut standing = Standing::at(At::RelayTls, &Start { options: &options, ..Start::default() });
    let client = standing.door.client.as_mut().unwrap();
    client.tls().unwrap().send_close_notify();
    client.flush();
    standing.door.backend.held().get_end().unwrap();
    let (started, before) = (Instant::now(), standing.door.processor_time());
    let flood = vec![b'Z'; 256 * 1024];
    let mut sent = 0;
    while started.elapsed() < Duration::from_secs(6) && !standing.door.said().contains("end=") {
        let client = standing.door.client.as_mut().unwrap();
        let taken = client.send_some(&flood);
        sent += taken;
        if taken == 0 {
            client.stream().wait(false, true, Instant::now() + Duration::from_millis(20));
        }
    }
    let (took, spent) = (started.elapsed(), standing.door.processor_time() - before);
    assert!(took < Duration::from_secs(5), "the relay's timer never fires");
    assert!(spent < Duration::from_millis(100), "{spent:?} of processor time");
    assert!(sent < 64 << 20, "{sent} octets taken");
    assert_eq!(standing.close(), 99);
}
