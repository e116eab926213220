//! What the loop calls each descriptor of a connection.

use mio::Token;

/// What the client sends.
pub const CLIENT_IN: Token = Token(0);
/// What the client is sent.
pub const CLIENT_OUT: Token = Token(1);
/// What the child says.
pub(super) const CHILD_OUT: Token = Token(2);
/// What the child is told.
pub(super) const CHILD_IN: Token = Token(3);
/// The backend's socket.
pub(super) const BACKEND: Token = Token(4);
/// The child's pidfd.
pub(super) const CHILD_EXIT: Token = Token(5);
/// The resolver's thread.
pub(super) const RESOLVED: Token = Token(6);
/// The control socket of a UCSPI-TLS server.
pub const TLS_SERVER: Token = Token(8);
/// SIGTERM.
pub const SIGNALS: Token = Token(7);
