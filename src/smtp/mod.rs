//! Pure SMTP grammar (RFC 5321): lines, commands, replies, the EHLO reply. Octets in, names out; no state of a session.

pub mod command;
pub mod ehlo;
pub mod line;
pub mod reply;
