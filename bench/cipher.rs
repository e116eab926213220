//! The work of a cipher without its TLS: what an end says and reads is encrypted record by record, into nothing. So a relay in clear has
//! ends of the same pace and the same pieces as one in TLS, which decide how often it is woken; it never sees what it moves.

use std::io;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// What goes into a record.
const PLAIN: usize = 16 * 1024;
/// The most that is written at once: a full record of TLS 1.3 on the wire, with its header, its type and its tag.
pub(crate) const RECORD: usize = PLAIN + 5 + 1 + 16;

pub(crate) struct Cipher {
    key: LessSafeKey,
    record: Vec<u8>,
}

impl Cipher {
    pub(crate) fn new() -> io::Result<Self> {
        aws_lc_rs::init(); // the build leaves this to the program
        let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| io::Error::other("no cipher"))?;
        Ok(Self { key: LessSafeKey::new(key), record: Vec::with_capacity(RECORD) })
    }

    pub(crate) fn work_over(&mut self, octets: &[u8]) -> io::Result<()> {
        for plain in octets.chunks(PLAIN) {
            self.record.clear();
            self.record.extend_from_slice(plain);
            let nonce = Nonce::assume_unique_for_key([0; 12]); // nobody gets to see it
            let sealed = self.key.seal_in_place_append_tag(nonce, Aad::empty(), &mut self.record);
            sealed.map_err(|_| io::Error::other("the cipher failed"))?;
        }
        Ok(())
    }
}
