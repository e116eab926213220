//! The work of a cipher without its TLS: what an end says and reads is encrypted record by record, into nothing. So a relay in clear has
//! ends of the same pace and the same pieces as one in TLS, which may decide how often it is woken; it never sees what it moves.

use std::io;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// What is encrypted at once, and the most that is written at once: a full record of TLS 1.3 on the wire, 16 KiB with its header, its type
/// and its tag.
const RECORD: usize = 16 * 1024 + 5 + 1 + 16;
/// How much rustls encrypts before it writes the first record of it.
const AHEAD: usize = 64 * 1024;

pub(crate) struct Cipher {
    key: LessSafeKey,
    record: Vec<u8>,
    /// So much of what is to be written next has been worked over.
    ahead: usize,
}

impl Cipher {
    pub(crate) fn new() -> io::Result<Self> {
        aws_lc_rs::init(); // the build leaves this to the program
        let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| io::Error::other("no cipher"))?;
        Ok(Self { key: LessSafeKey::new(key), record: Vec::with_capacity(RECORD + AES_256_GCM.tag_len()), ahead: 0 })
    }

    pub(crate) fn work_over(&mut self, octets: &[u8]) -> io::Result<()> {
        for plain in octets.chunks(RECORD) {
            self.record.clear();
            self.record.extend_from_slice(plain);
            let nonce = Nonce::assume_unique_for_key([0; 12]); // nobody gets to see it
            let sealed = self.key.seal_in_place_append_tag(nonce, Aad::empty(), &mut self.record);
            sealed.map_err(|_| io::Error::other("the cipher failed"))?;
        }
        Ok(())
    }

    /// Writes of these octets what a TLS server would at once, after the work that it would have done by then.
    pub(crate) fn write(&mut self, mut output: impl io::Write, octets: &[u8]) -> io::Result<usize> {
        if self.ahead == 0 {
            let next = &octets[..octets.len().min(AHEAD)];
            self.work_over(next)?;
            self.ahead = next.len();
        }
        let count = output.write(&octets[..octets.len().min(self.ahead).min(RECORD)])?;
        self.ahead -= count;
        Ok(count)
    }
}
