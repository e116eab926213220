//! Descriptors that whoever started us has left open for us under numbers: systemd, an fd holder of s6's kind, a shell.
//!
//! Contract: taken before any other descriptor is opened. A socket is shared with whoever holds it, and with all our loops; that it does not
//! block is a property of the socket and so becomes true for all of them.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};

use super::raw;
use crate::error::Fatal;

/// The TCP socket that listens under this number.
///
/// # Errors
/// [`Fatal::Usage`]: there is none.
pub fn listening(number: i32) -> Result<OwnedFd, Fatal> {
    let socket = descriptor("--listen fd", number)?;
    let is_ours = || {
        Ok::<_, Errno>(
            sockopt::socket_acceptconn(&socket)?
                && sockopt::socket_type(&socket)? == SocketType::STREAM
                && [AddressFamily::INET, AddressFamily::INET6].contains(&sockopt::socket_domain(&socket)?)
                && sockopt::socket_protocol(&socket)? == Some(ipproto::TCP),
        )
    };
    if is_ours() != Ok(true) {
        return Err(Fatal::Usage(format!("--listen fd:{number}: it is no TCP socket that listens")));
    }
    rustix::io::ioctl_fionbio(&socket, true)
        .map_err(|error| Fatal::System("use a socket that was left for us", error.into()))?;
    Ok(socket)
}

/// What is open under this number; `option` names it to us.
///
/// # Errors
/// [`Fatal::Usage`]: nothing is.
pub fn descriptor(option: &str, number: i32) -> Result<OwnedFd, Fatal> {
    raw::take_inherited(number).map_err(|error: io::Error| {
        Fatal::Usage(format!("{option} {number}: no such descriptor was left for us ({error})"))
    })
}
