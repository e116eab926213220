//! HOST is told who the client is, by a PROXY header: before the 220 as soon as it is reached, or behind the client's handshake, with
//! what is then known of its TLS. Nothing comes before the header on its connection.

use std::time::Instant;

use crate::proxy::Details;
use crate::session::Way;
use crate::sys::end::End;

use super::backend::Backend;
use super::conn::Conn;

impl Conn {
    /// The client's TLS stands, and HOST has waited for the header: it is sent, and HOST spoken to as the way has it.
    pub(super) fn tell_host(&mut self, now: Instant) -> bool {
        match self.tell_late() {
            Ok(backend) => {
                self.backend = Some(backend);
                self.session.handle_told(now);
            }
            Err(why) => self.session.handle_handover_failed(why, now),
        }
        true
    }

    fn tell_late(&mut self) -> Result<Backend, String> {
        let header = self.proxy.flatten().ok_or("there is no PROXY header")?;
        let facts = self.client.as_ref().and_then(|client| client.leg.as_ref()).map(|leg| leg.facts());
        let facts = facts.ok_or("nothing is known of the client's TLS")?;
        let details = Details {
            version: facts.version,
            suite: &facts.suite,
            server_name: facts.sni.as_deref(),
            protocol: facts.alpn.as_deref(),
        };
        let mut end = self.backend.take().and_then(Backend::into_socket).ok_or("it is not reached")?;
        tell(&mut end, &header.octets(Some(&details)))?;
        // By the way alone, as in `connect`.
        if self.policy.way == Way::PlainLate {
            return Ok(Backend::socket(end));
        }
        let setups = self.setups.as_ref().ok_or("TLS is not set up")?;
        setups.connect(end).map_err(|error| error.to_string())
    }
}

/// The PROXY header, in one write: a server may take what comes in two for no header. A fresh connection has room for it.
///
/// # Errors
/// In words.
pub fn tell(end: &mut End, header: &[u8]) -> Result<(), String> {
    match end.write(header) {
        Ok(Some(count)) if count == header.len() => Ok(()),
        Ok(_) => Err("it does not take the PROXY header at once".to_owned()),
        Err(error) => Err(format!("PROXY header: {error}")),
    }
}
