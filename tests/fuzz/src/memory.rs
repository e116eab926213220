//! Counts the octets that this thread holds, so that "bounded" is measured and not believed.
#![allow(unsafe_code)] // an allocator cannot be written without

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;

/// musl's own allocator is slow beyond use here.
#[cfg(target_env = "musl")]
static BENEATH: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;
#[cfg(not(target_env = "musl"))]
static BENEATH: std::alloc::System = std::alloc::System;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
}

/// Octets allocated by this thread and not freed, as far as it freed them itself.
#[must_use]
pub fn held() -> isize {
    HELD.with(Cell::get)
}

fn count(octets: usize, sign: isize) {
    // A thread that is ending has no counter any more.
    let _ = HELD.try_with(|held| held.set(held.get() + sign * octets as isize));
}

struct Counting;

// SAFETY: every call goes to the allocator beneath unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        unsafe { BENEATH.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        unsafe { BENEATH.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(layout.size(), -1);
        count(size, 1);
        unsafe { BENEATH.realloc(memory, layout, size) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        unsafe { BENEATH.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;
