//! What a second pair of eyes found once and nobody shall find again, as far as no dialogue can say it: each test stands
//! for one defect that was there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

#[path = "../support/mod.rs"]
mod support;

mod ends;
mod floods;
mod handover;
mod log;

use support::*;
