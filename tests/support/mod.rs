//! What the test programs share. Each says `mod support; use support::*;`.
#![allow(dead_code)] // each uses its part

pub(crate) mod backend;
pub(crate) mod child;
pub(crate) mod dialogue;
pub(crate) mod door;
pub(crate) mod lazily;
pub(crate) mod memory;
pub(crate) mod octets;
pub(crate) mod playing;
pub(crate) mod policy;
pub(crate) mod pure;
pub(crate) mod steps;
pub(crate) mod stream;
pub(crate) mod table;
pub(crate) mod trace;
pub(crate) mod ways;
pub(crate) mod wire;
