//! What a record costs in allocations once a session is under way, counted. One test only: the counter is the whole process's.
#![allow(unsafe_code)] // a counting allocator cannot be written without
#![allow(clippy::unwrap_used, missing_docs)]

use starttls_wrapper::tls::{Identity, Leg, Roots, Trust, client_setup, server_name, server_setup};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.realloc(memory, layout, size) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const RECORDS: usize = 1000;

/// Moves what `from` has queued into `to`, one large read at a time; how many allocations that took.
fn carry(from: &mut Leg, to: &mut Leg, received: &mut usize) -> usize {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    while from.wants_write() {
        let room = to.room();
        let n = room.len().min(from.outgoing().len());
        room[..n].copy_from_slice(&from.outgoing()[..n]);
        to.filled(n);
        from.sent(n);
        to.handle_records(&mut |plaintext| *received += plaintext.len()).unwrap();
    }
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn a_record_costs_no_allocation_of_ours() {
    let identity = Identity::self_signed("mx.example").unwrap();
    let name = server_name("mx.example").unwrap();
    let trust =
        Trust { own_leaf: Some(identity.leaf().clone()), roots: Roots::default(), name: name.clone(), insecure: false };
    let mut client = Leg::connect(&client_setup(trust).unwrap(), name).unwrap();
    let mut server = Leg::accept(&server_setup(&identity, None).unwrap()).unwrap();
    let mut received = 0;
    while client.wants_write() || server.wants_write() {
        carry(&mut client, &mut server, &mut received);
        carry(&mut server, &mut client, &mut received);
    }

    for size in [64, 16 * 1024] {
        let plaintext = vec![7; size];
        // Batches as a 256 KiB read would make them; the first ones let the buffers find their size.
        let batch = (200 * 1024 / size).min(100);
        let (mut sending, mut receiving) = (0, 0);
        for round in 0..10 + RECORDS / batch {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for _ in 0..batch {
                client.send(&plaintext).unwrap();
            }
            let sent = ALLOCATIONS.load(Ordering::Relaxed) - before;
            let taken = carry(&mut client, &mut server, &mut received);
            if round >= 10 {
                sending += sent;
                receiving += taken;
            }
        }
        let records = RECORDS / batch * batch;
        println!("{size} octets: {sending} allocations for {records} records sent, {receiving} for as many received");
        // What rustls 0.23 itself takes: one for a record it encrypts, two for one it decrypts.
        assert!(sending <= records, "{sending} allocations for {records} records sent");
        assert!(receiving <= 2 * records, "{receiving} allocations for {records} records received");
    }
    assert!(received > 0);
}
