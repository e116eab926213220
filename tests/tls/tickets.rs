//! Session tickets, as an independent client gets and shows them: between configurations that share keys, and others.

use crate::peers::{End, exchange_foreign, feed, flight, foreign_config, name, self_signed};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, RootCertStore, SupportedProtocolVersion};
use starttls_wrapper::tls::{Identity, Leg, ServerConfig, Tickets, server_name, server_setup};
use std::sync::Arc;

/// A line of a key file: name and secret, of one digit each.
fn key(name: char, secret: char) -> String {
    // 16 octets are 21 digits and a third.
    format!("{}A{}\n", name.to_string().repeat(21), secret.to_string().repeat(42))
}

fn server(identity: &Identity, keys: &str) -> Arc<ServerConfig> {
    server_setup(identity, Some(&Tickets::from_keys(keys.as_bytes()).unwrap())).unwrap()
}

/// One session, a reply in it: whether it was resumed, as both sides see it.
fn session(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, host: &str) -> bool {
    let mut client = ClientConnection::new(client.clone(), server_name(host).unwrap()).unwrap();
    let mut server = End::new(Leg::accept(server).unwrap());
    exchange_foreign(&mut client, &mut server).unwrap();
    server.leg.send(b"250 ok\r\n").unwrap();
    exchange_foreign(&mut client, &mut server).unwrap();
    let resumed = client.handshake_kind() == Some(HandshakeKind::Resumed);
    assert_eq!(server.leg.facts().resumed, resumed);
    resumed
}

fn client(identity: &Identity, version: &'static SupportedProtocolVersion) -> Arc<ClientConfig> {
    Arc::new(foreign_config(identity, &[version]))
}

const HOST: &str = crate::peers::HOST;

#[test]
fn a_session_is_resumed_where_the_key_is_and_nowhere_else() {
    let identity = self_signed(|_| {});
    let (old, new) = (key('a', 'b'), key('c', 'd'));
    for version in [&TLS12, &TLS13] {
        let client = client(&identity, version);
        assert!(!session(&client, &server(&identity, &old), HOST));
        assert!(session(&client, &server(&identity, &old), HOST), "another process with the same file");
        assert!(session(&client, &server(&identity, &(new.clone() + &old)), HOST), "rotated once");
        assert!(session(&client, &server(&identity, &new), HOST), "by then it had a ticket of the new key");
        assert!(!session(&client, &server(&identity, &old), HOST), "another key");
        // It is called as the key that sealed, and is another.
        assert!(session(&client, &server(&identity, &old), HOST));
        assert!(!session(&client, &server(&identity, &key('a', 'c')), HOST), "a ticket that does not open");
    }
}

#[test]
fn without_keys_no_ticket_is_taken() {
    let identity = self_signed(|_| {});
    for version in [&TLS12, &TLS13] {
        let client = client(&identity, version);
        session(&client, &server(&identity, &key('a', 'b')), HOST);
        assert!(!session(&client, &server_setup(&identity, None).unwrap(), HOST));
    }
}

#[test]
fn keys_of_one_process_are_good_for_all_who_share_them() {
    let identity = self_signed(|_| {});
    let tickets = Tickets::in_memory().unwrap();
    let set_up = |tickets: &Tickets| server_setup(&identity, Some(tickets)).unwrap();
    for version in [&TLS12, &TLS13] {
        let client = client(&identity, version);
        assert!(!session(&client, &set_up(&tickets), HOST));
        assert!(session(&client, &set_up(&tickets.clone()), HOST));
        assert!(!session(&client, &set_up(&Tickets::in_memory().unwrap()), HOST));
    }
}

#[test]
fn who_shares_a_key_and_shows_another_certificate_resumes_nothing() {
    let (one, other) = (self_signed(|_| {}), self_signed(|_| {}));
    for version in [&TLS12, &TLS13] {
        let mut roots = RootCertStore::empty();
        [&one, &other].iter().for_each(|identity| roots.add(identity.leaf().clone()).unwrap());
        let config = ClientConfig::builder_with_protocol_versions(&[version]);
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let client = Arc::new(config);
        assert!(!session(&client, &server(&one, &key('a', 'b')), HOST));
        assert!(!session(&client, &server(&other, &key('a', 'b')), HOST));
    }
}

#[test]
fn a_client_that_wants_another_protocol_is_refused_with_a_ticket_too() {
    let identity = self_signed(|_| {});
    let server = server(&identity, &key('a', 'b'));
    for version in [&TLS12, &TLS13] {
        let mut config = foreign_config(&identity, &[version]);
        config.alpn_protocols = vec![b"smtp".to_vec()];
        let smtp = Arc::new(config.clone());
        assert!(!session(&smtp, &server, HOST));
        assert!(session(&smtp, &server, HOST));
        // The same tickets.
        config.alpn_protocols = vec![b"h2".to_vec()];
        let mut client = ClientConnection::new(Arc::new(config), name()).unwrap();
        let mut end = End::new(Leg::accept(&server).unwrap());
        assert!(exchange_foreign(&mut client, &mut end).is_err());
    }
}

#[test]
fn one_ticket_is_given_and_it_leaves_with_the_first_reply() {
    let identity = self_signed(|_| {});
    let server = server(&identity, &key('a', 'b'));
    let config = client(&identity, &TLS13);
    for resumed in [false, true] {
        let mut client = ClientConnection::new(config.clone(), name()).unwrap();
        let mut end = End::new(Leg::accept(&server).unwrap());
        end.take(&flight(&mut client), usize::MAX).unwrap();
        feed(&mut client, &end.take_outgoing()).unwrap();
        end.take(&flight(&mut client), usize::MAX).unwrap();
        assert!(!end.leg.is_handshaking() && !end.leg.wants_write(), "a write of its own");
        assert_eq!(end.leg.facts().resumed, resumed);
        // What has nothing in it is no company.
        end.leg.send(b"").unwrap();
        assert!(end.leg.outgoing().is_empty());
        end.leg.send(b"250 ok\r\n").unwrap();
        feed(&mut client, &end.take_outgoing()).unwrap();
        assert_eq!(client.tls13_tickets_received(), 1);
    }
}

#[test]
fn a_ticket_that_waits_leaves_with_the_end_and_with_an_alert() {
    let identity = self_signed(|_| {});
    let server = server(&identity, &key('a', 'b'));
    for is_broken in [false, true] {
        let mut client = ClientConnection::new(client(&identity, &TLS13), name()).unwrap();
        let mut end = End::new(Leg::accept(&server).unwrap());
        exchange_foreign(&mut client, &mut end).unwrap();
        if is_broken {
            end.take(&[23, 3, 3, 0, 17, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], usize::MAX)
                .unwrap_err();
        } else {
            end.leg.send_close();
        }
        let told = feed(&mut client, &end.take_outgoing());
        assert_eq!(client.tls13_tickets_received(), 1);
        assert_eq!(told.is_err(), is_broken, "{told:?}");
    }
}

#[test]
fn no_early_data_is_offered() {
    let identity = self_signed(|_| {});
    let server = server(&identity, &key('a', 'b'));
    let mut config = foreign_config(&identity, &[&TLS13]);
    config.enable_early_data = true;
    let config = Arc::new(config);
    assert!(!session(&config, &server, HOST));
    assert!(session(&config, &server, HOST));
    assert!(ClientConnection::new(config, name()).unwrap().early_data().is_none());
}
