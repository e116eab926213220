//! One TLS connection over two byte buffers, whichever side of it we are.
//!
//! Contract, call order: after every read, [`Leg::room`] -> read -> [`Leg::filled`] -> [`Leg::handle_records`], which consumes all that
//! can be consumed; back-pressure is exerted by not reading, never by not handling. After every call, [`Leg::outgoing`] may have
//! grown. [`Leg::send`] at any time: it looks only at bytes that `handle_records` has seen, so it never yields plaintext.
//! An error of rustls is final: its alert is queued, every later call returns the same error. [`TlsError::NotReady`] and
//! [`TlsError::AfterClose`] are not: they say that the caller was wrong.
//! Steady state: several records per read and per write, one buffer each way, no allocation and no copy of ours per record. rustls
//! 0.23 itself copies: of a received record the plaintext into an allocation of its own, though it was decrypted in place; of a
//! sent one the plaintext into the buffer where it is encrypted, and that into ours. Its interface leaves no way round it.

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, InsufficientSizeError, UnbufferedConnectionCommon,
    UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, CommonState, HandshakeKind, ProtocolVersion, ServerConfig};
use std::any::Any;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::buffer::{HANDSHAKE_CAP, Incoming, TRAFFIC_CAP};
use super::error::TlsError;
use super::setup::take_server_name_seen;
use super::tickets;
use crate::buffer::Outgoing;

/// Most plaintext in one record (RFC 8446 5.1).
const RECORD_PLAINTEXT: usize = 16 * 1024;
/// Most that a record is longer than its plaintext: 29 octets with AES-GCM in TLS 1.2, 22 in TLS 1.3.
const RECORD_OVERHEAD: usize = 32;
/// Room for what may precede our data: one key update, the answer to one, an alert.
const PRECEDING: usize = 128;

/// One TLS connection, either side. Owns what came in and is not consumed, and what waits to be written.
pub struct Leg {
    side: Side,
    wire: Wire,
    sni: Option<String>,
    /// When the session that is resumed began.
    began: Option<u64>,
    /// Nothing waits but a ticket, which has time until something else does.
    is_in_no_hurry: bool,
    close_queued: bool,
    failed: Option<TlsError>,
}

#[allow(clippy::large_enum_variant)] // 1088 and 976 octets
enum Side {
    Server(UnbufferedServerConnection),
    Client(UnbufferedClientConnection),
}

/// What a connection reads from and writes to.
#[derive(Default)]
struct Wire {
    incoming: Incoming,
    outgoing: Outgoing,
    peer_closed: bool,
}

/// What was negotiated, for the log. Only `sni` and `alpn` hold text that the peer chose: escape it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Facts {
    /// `TLSv1.3`, `TLSv1.2`, or `none` as long as nothing is agreed.
    pub version: &'static str,
    /// The cipher suite by its IANA name, or `none`.
    pub suite: String,
    /// The key exchange group, e.g. `X25519MLKEM768`.
    pub group: Option<String>,
    /// The application protocol agreed on; none if the client offered none.
    pub alpn: Option<Vec<u8>>,
    /// Server side: the name that the client asked for.
    pub sni: Option<String>,
    /// Whether it goes on from an earlier session's secret: no certificate was shown.
    pub resumed: bool,
}

impl Leg {
    /// The server side, towards a client. Errors: [`TlsError::Setup`].
    pub fn accept(config: &Arc<ServerConfig>) -> Result<Self, TlsError> {
        let connection = UnbufferedServerConnection::new(config.clone()).map_err(TlsError::Setup)?;
        Ok(Self::over(Side::Server(connection)))
    }

    /// The client side, towards the backend; `name` goes into the ClientHello unless it is an address. The ClientHello is queued
    /// at once. Errors: [`TlsError::Setup`].
    pub fn connect(config: &Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, TlsError> {
        let connection = UnbufferedClientConnection::new(config.clone(), name).map_err(TlsError::Setup)?;
        let mut leg = Self::over(Side::Client(connection));
        leg.handle_records(&mut |_| {})?;
        Ok(leg)
    }

    fn over(side: Side) -> Self {
        Self {
            side,
            wire: Wire::default(),
            sni: None,
            began: None,
            is_in_no_hurry: false,
            close_queued: false,
            failed: None,
        }
    }

    /// Spare space to read ciphertext into; may allocate. Empty only if nothing more is wanted: the leg failed, or the peer has
    /// sent its close_notify.
    pub fn room(&mut self) -> &mut [u8] {
        if self.failed.is_some() || self.wire.peer_closed {
            return &mut [];
        }
        let handshaking = self.is_handshaking();
        self.wire.incoming.room(cap(handshaking), !handshaking)
    }

    /// `n` octets were read into what [`Leg::room`] gave last.
    pub fn filled(&mut self, n: usize) {
        self.wire.incoming.filled(n);
    }

    /// Consumes the held records until more bytes are needed. The plaintext of each record goes to `sink`, one record a call, in
    /// order, borrowed. Answers of the handshake and alerts are queued.
    ///
    /// Errors: everything in [`TlsError`] but `Setup`, `NotReady` and `AfterClose`. Plaintext of records before the bad one has been
    /// delivered. A panic of `sink` is caught and fails the leg too.
    pub fn handle_records(&mut self, sink: &mut dyn FnMut(&[u8])) -> Result<(), TlsError> {
        if self.is_handshaking() { self.shake_hands(sink) } else { self.perform(Task::Receive(sink)) }?;
        if self.wire.peer_closed {
            // RFC 8446 6.1: whatever follows a close_notify is ignored.
            self.wire.incoming.clear();
        } else if self.wire.incoming.len() >= cap(self.is_handshaking()) {
            return Err(self.fail(TlsError::HandshakeTooLarge));
        }
        Ok(())
    }

    fn shake_hands(&mut self, sink: &mut dyn FnMut(&[u8])) -> Result<(), TlsError> {
        take_server_name_seen();
        let (mut began, was_silent) = (self.began, !self.wants_write());
        let result = tickets::handshake(&mut began, || self.perform(Task::Receive(sink)));
        self.began = began;
        self.sni = take_server_name_seen().or(self.sni.take());
        // In TLS 1.3 a server's last flight is before the client's: the ticket that follows would be a write of its own.
        let is_tls13 = self.common().protocol_version() == Some(ProtocolVersion::TLSv1_3);
        self.is_in_no_hurry = result.is_ok()
            && was_silent
            && is_tls13
            && matches!(self.side, Side::Server(_))
            && !self.is_handshaking()
            && !self.wire.outgoing.waiting().is_empty();
        result
    }

    /// Encrypts `plaintext` into the outgoing queue, in records of at most 16 KiB; nothing is queued for an empty one.
    ///
    /// The queue has no cap: stop feeding while it is long. Errors: [`TlsError::NotReady`] before the handshake allows it,
    /// [`TlsError::AfterClose`], and the final ones.
    pub fn send(&mut self, plaintext: &[u8]) -> Result<(), TlsError> {
        if self.close_queued && self.failed.is_none() {
            return Err(TlsError::AfterClose);
        }
        self.is_in_no_hurry &= plaintext.is_empty();
        self.perform(Task::Send(plaintext))
    }

    /// Queues our close_notify, once: no more is sent, receiving goes on. Does nothing before the handshake allows it (there is
    /// no close to a connection that never was; the end of the TCP stream says it) and nothing on a failed leg.
    pub fn send_close(&mut self) {
        if !self.close_queued && self.perform(Task::Close).is_ok() {
            self.close_queued = true;
            self.is_in_no_hurry = false;
        }
    }

    /// What waits to be written, oldest first. A session ticket of TLS 1.3 waits unseen for what follows it, to leave in the same write.
    pub fn outgoing(&self) -> &[u8] {
        if self.is_in_no_hurry { &[] } else { self.wire.outgoing.waiting() }
    }

    /// The first `n` octets of [`Leg::outgoing`] were written.
    pub fn sent(&mut self, n: usize) {
        self.wire.outgoing.sent(n);
    }

    /// Whether [`Leg::outgoing`] holds anything.
    pub fn wants_write(&self) -> bool {
        !self.outgoing().is_empty()
    }

    /// Whether the handshake is still going on. A failed handshake stays one.
    pub fn is_handshaking(&self) -> bool {
        self.common().is_handshaking()
    }

    /// Whether the peer's close_notify was seen: all it sent has been delivered. The end of the TCP stream without it is a
    /// truncation; only the caller sees that end. Before the handshake is done no close_notify counts, since nobody signed it.
    pub fn peer_closed(&self) -> bool {
        self.wire.peer_closed
    }

    /// Whether an error was final.
    pub fn is_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// What was negotiated so far.
    pub fn facts(&self) -> Facts {
        let common = self.common();
        Facts {
            version: match common.protocol_version() {
                Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
                Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
                Some(_) => "other",
                None => "none",
            },
            // rustls writes TLS13_AES_256_GCM_SHA384 where IANA has TLS_AES_256_GCM_SHA384.
            suite: common.negotiated_cipher_suite().map_or_else(
                || "none".to_owned(),
                |suite| format!("{:?}", suite.suite()).replacen("TLS13_", "TLS_", 1),
            ),
            group: common.negotiated_key_exchange_group().map(|group| format!("{:?}", group.name())),
            alpn: common.alpn_protocol().map(<[u8]>::to_vec),
            sni: self.sni.clone(),
            resumed: common.handshake_kind() == Some(HandshakeKind::Resumed),
        }
    }

    /// The certificates that the peer has shown, leaf first.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        self.common().peer_certificates().unwrap_or_default()
    }

    /// Gives the buffers' memory back, but for what is held and what waits. For a connection that waits: it may be for long.
    pub fn give_back(&mut self) {
        self.wire.incoming.give_back();
        self.wire.outgoing.give_back();
    }

    /// Octets of memory that the two buffers occupy.
    pub fn footprint(&self) -> usize {
        self.wire.incoming.footprint() + self.wire.outgoing.footprint()
    }

    pub(super) fn common(&self) -> &CommonState {
        match &self.side {
            Side::Server(connection) => connection,
            Side::Client(connection) => connection,
        }
    }

    /// Runs one task on whichever side we are, and makes a final error stay.
    fn perform(&mut self, task: Task<'_>) -> Result<(), TlsError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let (side, wire) = (&mut self.side, &mut self.wire);
        // After a panic neither the connection nor the buffers are used again, but for what was queued before.
        let outcome = catch_unwind(AssertUnwindSafe(|| match side {
            Side::Server(connection) => advance(&mut **connection, wire, task),
            Side::Client(connection) => advance(&mut **connection, wire, task),
        }));
        match outcome {
            Ok(Err(error @ (TlsError::NotReady | TlsError::AfterClose))) => Err(error),
            Ok(Err(error)) => Err(self.fail(error)),
            Ok(Ok(())) => Ok(()),
            Err(payload) => Err(self.fail(TlsError::Panicked(panic_message(payload.as_ref())))),
        }
    }

    fn fail(&mut self, error: TlsError) -> TlsError {
        self.wire.incoming.clear();
        // An alert waits.
        self.is_in_no_hurry = false;
        self.failed = Some(error.clone());
        error
    }
}

/// How much may be held.
fn cap(handshaking: bool) -> usize {
    if handshaking { HANDSHAKE_CAP } else { TRAFFIC_CAP }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

/// The one call that rustls writes twice, once for each side.
trait Connection: Deref<Target = CommonState> {
    type Data;
    fn records<'c, 'i>(&'c mut self, held: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Connection for UnbufferedConnectionCommon<ServerConnectionData> {
    type Data = ServerConnectionData;
    fn records<'c, 'i>(&'c mut self, held: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(held)
    }
}

impl Connection for UnbufferedConnectionCommon<ClientConnectionData> {
    type Data = ClientConnectionData;
    fn records<'c, 'i>(&'c mut self, held: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(held)
    }
}

/// What a connection is driven for.
enum Task<'a> {
    /// Consume every held record.
    Receive(&'a mut dyn FnMut(&[u8])),
    /// Reach the state that encrypts, and encrypt this.
    Send(&'a [u8]),
    /// Reach it, and say close_notify.
    Close,
}

/// Drives a connection until `task` is done or more bytes are needed; encodes on the way whatever rustls has to say.
///
/// The held bytes are always shown whole, because rustls keeps offsets into them. For sending they are shown as far as an earlier
/// `Receive` saw them: that yields no record, however much was read since.
fn advance<C: Connection>(connection: &mut C, wire: &mut Wire, mut task: Task<'_>) -> Result<(), TlsError> {
    loop {
        let held = match task {
            Task::Receive(_) => wire.incoming.all(),
            Task::Send(_) | Task::Close => wire.incoming.seen(),
        };
        let UnbufferedStatus { mut discard, state } = connection.records(held);
        let done = match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => match &mut task {
                Task::Receive(sink) => loop {
                    match traffic.next_record() {
                        Some(Ok(record)) => {
                            discard += record.discard;
                            sink(record.payload);
                        }
                        Some(Err(error)) => break Err(TlsError::from_rustls(error, true)),
                        None => break Ok(false),
                    }
                },
                Task::Send(_) | Task::Close => Err(TlsError::Unexpected("plaintext while sending")),
            },
            Ok(ConnectionState::EncodeTlsData(mut message)) => encode(&mut message, &mut wire.outgoing).map(|()| false),
            Ok(ConnectionState::TransmitTlsData(transmission)) => {
                // Queued is as good as sent: the queue keeps the order.
                transmission.done();
                Ok(false)
            }
            Ok(ConnectionState::PeerClosed) => {
                wire.peer_closed = true;
                Ok(false)
            }
            Ok(ConnectionState::WriteTraffic(mut traffic)) => match &task {
                Task::Receive(_) => Ok(true),
                Task::Send(plaintext) => encrypt(&mut traffic, plaintext, &mut wire.outgoing).map(|()| true),
                Task::Close => close(&mut traffic, &mut wire.outgoing).map(|()| true),
            },
            Ok(ConnectionState::BlockedHandshake) => match task {
                Task::Receive(_) => Ok(true),
                Task::Send(_) | Task::Close => Err(TlsError::NotReady),
            },
            Ok(ConnectionState::Closed) => match task {
                Task::Receive(_) => Ok(true),
                Task::Send(_) | Task::Close => Err(TlsError::AfterClose),
            },
            Ok(_) => Err(TlsError::Unexpected("early data, or a state of a later rustls")),
            Err(error) => Err(TlsError::from_rustls(error, connection.protocol_version().is_some())),
        };
        wire.incoming.discard(discard);
        match done {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => {
                drain_alert(connection, wire);
                return Err(error);
            }
        }
    }
}

/// Fetches what rustls queued together with an error. While it has something queued it returns that before it looks at the bytes
/// it is shown, so the empty slice is safe, and only then.
fn drain_alert<C: Connection>(connection: &mut C, wire: &mut Wire) {
    while connection.wants_write() {
        match connection.records(&mut []).state {
            Ok(ConnectionState::EncodeTlsData(mut message)) => {
                if encode(&mut message, &mut wire.outgoing).is_err() {
                    return;
                }
            }
            Ok(ConnectionState::ReadTraffic(mut traffic)) => while traffic.next_record().is_some() {},
            _ => return,
        }
    }
}

fn encode<D>(message: &mut EncodeTlsData<'_, D>, outgoing: &mut Outgoing) -> Result<(), TlsError> {
    let mut needed = RECORD_PLAINTEXT / 4;
    loop {
        match message.encode(outgoing.spare(needed)) {
            Ok(n) => {
                outgoing.queued(n);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) if required_size > needed => {
                needed = required_size;
            }
            Err(_) => {
                return Err(TlsError::Unexpected("a handshake message that cannot be encoded"));
            }
        }
    }
}

fn encrypt<D>(traffic: &mut WriteTraffic<'_, D>, plaintext: &[u8], outgoing: &mut Outgoing) -> Result<(), TlsError> {
    let records = plaintext.len().div_ceil(RECORD_PLAINTEXT);
    let needed = plaintext.len() + records * RECORD_OVERHEAD + PRECEDING;
    write_traffic(outgoing, needed, |spare| traffic.encrypt(plaintext, spare))
}

fn close<D>(traffic: &mut WriteTraffic<'_, D>, outgoing: &mut Outgoing) -> Result<(), TlsError> {
    write_traffic(outgoing, PRECEDING, |spare| traffic.queue_close_notify(spare))
}

/// Lets `write` fill spare space, with more of it if it says so: it has consumed nothing then.
fn write_traffic(
    outgoing: &mut Outgoing,
    mut needed: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, EncryptError>,
) -> Result<(), TlsError> {
    loop {
        match write(outgoing.spare(needed)) {
            Ok(n) => {
                outgoing.queued(n);
                return Ok(());
            }
            Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size })) if required_size > needed => {
                needed = required_size;
            }
            Err(EncryptError::InsufficientSize(_)) => {
                return Err(TlsError::Unexpected("a record that never fits"));
            }
            Err(EncryptError::EncryptExhausted) => return Err(TlsError::KeysExhausted),
        }
    }
}
