//! The fuzz targets: each module has `run`, which takes arbitrary octets and panics where an invariant breaks.
//!
//! | target | what is driven | what must hold |
//! |---|---|---|
//! | [`snoop`] | client streams, cut anywhere, a child that answers each line | child and client get what an independent reading of protocol.md says |
//! | [`ehlo`] | a child's replies, cut anywhere | the edited reply is one reply, leaves at once, and differs in its keyword alone |
//! | [`session`] | the whole session: everybody's octets, events, stalls, time | see [`witness`] |
//! | [`learned`] | a server's replies, and texts | what a stand-in says is what was heard; the text reads the same again |
//! | [`facts`] | addresses, words, variables | the PROXY header as another reader has it; PROG is told no orders |
//! | [`proxy`] | what a load balancer sends, addresses, words | the PROXY header as another reader has it, and not an octet more; ours is heard as it was meant |
//! | [`tls`] | both legs: raw octets, damaged records, handshakes, any fragment sizes | plaintext is a prefix of what was sent; memory is capped |
//!
//! Used twice: by libFuzzer (`scripts/fuzz`), and by the program's own tests (`tests/fuzz.rs`).

#[allow(dead_code)] // the seeds need more of it (tests/fuzz.rs)
#[path = "../../support/dialogue.rs"]
pub(crate) mod dialogue;
pub mod ehlo;
pub mod facts;
pub mod learned;
pub mod lines;
pub mod memory;
#[allow(dead_code)] // the dialogues need more of it
#[path = "../../support/policy.rs"]
mod policy;
pub mod proxy;
mod script;
pub mod session;
pub mod snoop;
pub mod tls;
mod witness;
