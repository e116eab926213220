//! Where session tickets for clients come from: the file of `--ticket-keys`, or keys of this process alone.
//!
//! Contract: [`from_file`] may be called again while sessions are served; what it returns is for those that begin later. A file that
//! somebody else can read is refused: who has a key can read the sessions of TLS 1.2 whose tickets it sealed. What a bad file
//! comes to is decided by the caller. A UCSPI child warns and goes on without tickets, which are but speed: clients must
//! not lose their mail for it. A listener refuses to start with one, as the administrator is there who meant it to be shared; and
//! keeps the old keys where SIGHUP has it read again.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use zeroize::Zeroizing;

use crate::tls::Tickets;

/// Far more than eight keys and what is said about them.
const LONGEST: usize = 16 * 1024;

/// The keys of this file.
///
/// # Errors
/// Why it has none, with its name.
pub(crate) fn from_file(path: &Path) -> Result<Tickets, String> {
    from_file_by(path, |path| File::open(path))
}

/// The same, where somebody else has to open it.
pub(super) fn from_file_by(path: &Path, open: impl Fn(&Path) -> io::Result<File>) -> Result<Tickets, String> {
    read(path, open)
        .and_then(|text| Tickets::from_keys(&text))
        .map_err(|why| format!("ticket keys {}: {why}", path.display()))
}

fn read(path: &Path, open: impl Fn(&Path) -> io::Result<File>) -> Result<Zeroizing<Vec<u8>>, String> {
    let unread = |error: io::Error| format!("can't read it: {error}");
    let file = open(path).map_err(unread)?;
    // Not std's metadata: statx(2) is more than a listener may call by then.
    let mode = rustix::fs::fstat(&file).map_err(|error| unread(error.into()))?.st_mode;
    if mode & 0o077 != 0 {
        return Err(format!("others may use it (mode {:04o}): chmod 600", mode & 0o7777));
    }
    // Of one size from the start: what grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(LONGEST + 1));
    file.take(LONGEST as u64 + 1).read_to_end(&mut text).map_err(unread)?;
    if text.len() > LONGEST { Err(format!("longer than {LONGEST} octets")) } else { Ok(text) }
}
