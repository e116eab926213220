//! What the checks of the command line accept and refuse.

use super::*;
use crate::cli::{Invocation, read};
use crate::smtp::command::Verb;

fn with(line: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
    let environment = |name: &str| variables.iter().find(|&&(known, _)| known == name).map(|(_, value)| value.into());
    match read(line.split_whitespace().map(OsString::from), environment) {
        Ok(Invocation::Serve(config)) => Ok(*config),
        Err(Fatal::Usage(what)) => Err(what),
        other => panic!("{other:?}"),
    }
}

fn config(line: &str) -> Config {
    with(&format!("{line} localhost 465 prog"), &[]).unwrap()
}

fn refused(line: &str) -> String {
    with(&format!("{line} localhost 465 prog"), &[]).unwrap_err()
}

#[test]
fn three_words_are_enough_and_give_the_defaults() {
    let config = with("mx.example.org 465 qmail-smtpd -a b", &[]).unwrap();
    assert_eq!(config.server, Some(Server::Tcp { host: "mx.example.org".to_owned(), port: 465 }));
    assert_eq!((config.program, config.arguments), ("qmail-smtpd".into(), vec!["-a".into(), "b".into()]));
    assert_eq!(config.identity, IdentitySource::None);
    assert_eq!(config.policy, Policy { offer_tls: false, ..Policy::default() });
    assert_eq!((config.ca_file, config.ca_dir, config.backend_name), (None, None, None));
    assert_eq!((config.backend_insecure, config.backend_source), (false, None));
    assert_eq!((config.relay, config.verbosity), (RelayMode::Splice, LevelFilter::Info));
    assert_eq!((config.uid, config.gid), (None, None));
}

#[test]
fn a_proxy_header_is_of_version_1_or_2_and_for_host() {
    assert_eq!(config("").send_proxy, None);
    assert_eq!(config("--send-proxy v1").send_proxy, Some(Version::V1));
    assert_eq!(config("--send-proxy=v2").send_proxy, Some(Version::V2));
    assert_eq!(refused("--send-proxy 2"), "--send-proxy takes v1|v2, not \"2\"");
    for way in ["keep", "respawn"] {
        let why = with(&format!("--way {way} --send-proxy v1 prog"), &[]).unwrap_err();
        assert!(why.starts_with("--send-proxy says nothing with"), "{why}");
    }
}

#[test]
fn ticket_keys_are_for_tls_of_ours_and_a_certificate_that_lasts() {
    assert_eq!(config("--cert c").ticket_keys, None);
    assert_eq!(config("--cert c --ticket-keys f").ticket_keys, Some("f".into()));
    for way in ["keep", "respawn"] {
        let config = with(&format!("--way {way} --cert c --ticket-keys f prog"), &[]).unwrap();
        assert_eq!(config.ticket_keys, Some("f".into()));
    }
    assert!(with("--listen 127.0.0.1:25 --ticket-keys f localhost 465 prog", &[("CERTFILE", "c")]).is_ok());
    assert!(refused("--ticket-keys f").starts_with("--ticket-keys: there is no TLS without a certificate"));
    assert!(refused("--self-signed mx --ticket-keys f").ends_with("leave out --ticket-keys"));
    for line in
        ["--way raw --ticket-keys f localhost 465 p", "--way ucspi-tls --ticket-keys f p", "--mute --ticket-keys f p"]
    {
        let why = with(line, &[("CERTFILE", "c")]).unwrap_err();
        assert!(why.starts_with("--ticket-keys says nothing with --"), "{why}");
    }
    let why = with("--way ucspi-tls-respawn --ticket-keys f p", &[]).unwrap_err();
    assert_eq!(why, "--ticket-keys says nothing with --way ucspi-tls-respawn");
}

#[test]
fn facts_come_late_with_version_2_where_host_is_spoken_to_and_the_tls_is_ours() {
    let way = |line: &str| with(line, &[]).map(|config| config.policy.way);
    let host = "localhost 465 p";
    assert_eq!(way(&format!("--send-proxy v2 {host}")), Ok(Way::Tls));
    assert_eq!(way(&format!("--send-proxy v2 --proxy-facts early {host}")), Ok(Way::Tls));
    assert_eq!(way(&format!("--proxy-facts late --send-proxy v2 {host}")), Ok(Way::TlsLate));
    assert_eq!(way(&format!("--way plain --send-proxy v2 --proxy-facts=late {host}")), Ok(Way::PlainLate));
    for line in ["--proxy-facts late", "--proxy-facts early", "--send-proxy v1 --proxy-facts late"] {
        assert_eq!(refused(line), "--proxy-facts counts only with --send-proxy v2", "{line}");
    }
    assert_eq!(refused("--send-proxy v2 --proxy-facts never"), "--proxy-facts takes early|late, not \"never\"");
    let why = way(&format!("--way raw --send-proxy v2 --proxy-facts late {host}")).unwrap_err();
    assert_eq!(why, "--proxy-facts says nothing with --way raw");
    for line in ["--way keep", "--way respawn", "--way ucspi-tls", "--way ucspi-tls-respawn", "--mute"] {
        let why = way(&format!("{line} --proxy-facts late p")).unwrap_err();
        assert!(why.starts_with("--proxy-facts says nothing with"), "{why}");
    }
}

/// What is refused or checked for the way is so however late HOST is told.
#[test]
fn nothing_goes_late_in_the_clear_over_a_network() {
    let why = with("--way plain --send-proxy v2 --proxy-facts late mx.example.org 25 p", &[]).unwrap_err();
    assert!(why.contains("only for localhost"), "{why}");
}

#[test]
fn a_host_on_loopback_may_relay_for_all_unless_it_is_told_or_that_is_meant() {
    let warns = |line: &str| with(line, &[]).unwrap().may_relay_for_all;
    let near = ["localhost 25", "127.9.9.9 25", "::1 25", "::ffff:127.0.0.1 25"];
    for server in near {
        for way in ["", "--way plain", "--way raw"] {
            assert!(warns(&format!("{way} {server} p")), "{way} {server}");
            for option in ["--send-proxy v1", "--send-proxy v2", "--trusted-loopback"] {
                assert!(!warns(&format!("{way} {option} {server} p")), "{way} {option} {server}");
            }
        }
    }
    for source in ["127.0.0.53", "192.0.2.1", "::ffff:127.0.0.53", "2001:db8::1"] {
        assert!(!warns(&format!("--backend-source {source} localhost 25 p")), "{source}");
    }
    // What it would have come from anyway.
    for source in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
        assert!(warns(&format!("--backend-source {source} localhost 25 p")), "{source}");
    }
    assert!(warns("--way plain unix:/run/smtp p") && !warns("--way plain --send-proxy v1 unix:/run/smtp p"));
    for line in ["mx.example.org 465 p", "192.0.2.1 465 p", "--way keep p", "--way respawn p", "--mute p"] {
        assert!(!warns(line), "{line}");
    }
    let why = with("--way keep --trusted-loopback p", &[]).unwrap_err();
    assert_eq!(why, "--trusted-loopback says nothing with --way keep");
}

#[test]
fn a_daemon_on_loopback_may_relay_for_all_unless_that_is_meant() {
    let warns = |line: &str| with(&format!("--listen 127.0.0.1:25 {line}"), &[]).unwrap().may_relay_in_clear;
    let servers = ["--plain 127.0.0.1:26", "--plain [::1]:26", "--plain localhost:26", "--plain unix:/run/smtp"];
    for server in servers {
        for way in ["mx.example.org 465", "--send-proxy v1 127.0.0.1 465", "--backend-source 127.0.0.53 127.0.0.1 465"]
        {
            assert!(warns(&format!("{server} {way}")), "{server} {way}");
            assert!(!warns(&format!("{server} --trusted-loopback {way}")), "{server} {way}");
            assert!(!warns(&format!("{server} --require-tls {way}")), "{server} {way}");
        }
        assert!(warns(&format!("{server} --require-tls --way keep")), "{server}");
        assert!(!warns(&format!("{server} --trusted-loopback --way keep")), "{server}");
    }
    for line in ["--plain 192.0.2.1:26 localhost 465", "localhost 465 p", "--way keep p"] {
        assert!(!warns(line), "{line}");
    }
}

#[test]
fn ports_are_numbers_from_1_to_65535() {
    for port in ["1", "465", "65535"] {
        let expected = Server::Tcp { host: "h".to_owned(), port: port.parse().unwrap() };
        assert_eq!(with(&format!("h {port} p"), &[]).unwrap().server, Some(expected));
    }
    for port in ["0", "65536", "+25", "-1", "smtps", "465x", "--cert"] {
        assert!(with(&format!("h {port} p"), &[]).unwrap_err().starts_with("PORT must be"), "{port}");
    }
}

#[test]
fn host_and_prog_must_not_be_empty() {
    for words in [["", "1", "p"], ["h", "1", ""], ["a b", "1", "p"], ["h\n", "1", "p"]] {
        let Err(Fatal::Usage(what)) = read(words.map(OsString::from), |_| None) else { panic!("{words:?}") };
        assert!(!what.contains('\n'), "{what:?}");
    }
}

#[test]
fn the_key_may_be_in_the_file_of_the_certificate() {
    let files = |cert: &str, key: &str| IdentitySource::Files { cert: cert.into(), key: key.into() };
    assert_eq!(config("--cert both.pem").identity, files("both.pem", "both.pem"));
    assert_eq!(config("--cert c --key k").identity, files("c", "k"));
    assert!(config("--cert c").policy.offer_tls);
}

#[test]
fn options_win_over_the_environment() {
    let variables = [("CERTFILE", "ec"), ("KEYFILE", "ek"), ("CAFILE", "ef"), ("CADIR", "ed")];
    let config = with("h 1 p", &variables).unwrap();
    assert_eq!(config.identity, IdentitySource::Files { cert: "ec".into(), key: "ek".into() });
    assert_eq!((config.ca_file, config.ca_dir), (Some("ef".into()), Some("ed".into())));

    let config = with("--cert c --key k --backend-ca f h 1 p", &variables).unwrap();
    assert_eq!(config.identity, IdentitySource::Files { cert: "c".into(), key: "k".into() });
    assert_eq!((config.ca_file, config.ca_dir), (Some("f".into()), None));

    let config = with("--self-signed mx h 1 p", &variables).unwrap();
    assert_eq!(config.identity, IdentitySource::SelfSigned("mx".into()));
}

#[test]
fn empty_variables_are_none() {
    let config = with("h 1 p", &[("CERTFILE", ""), ("KEYFILE", ""), ("CADIR", ""), ("TLS_UID", "")]).unwrap();
    assert_eq!((config.identity, config.ca_dir, config.uid), (IdentitySource::None, None, None));
}

#[test]
fn identities_that_contradict_each_other_are_refused() {
    assert!(refused("--self-signed mx --cert c").contains("leave out --cert"));
    assert!(refused("--key k --self-signed mx").contains("leave out --key"));
    assert!(refused("--key k").contains("--cert (or CERTFILE) is missing"));
    assert!(with("h 1 p", &[("KEYFILE", "k")]).is_err());
}

#[test]
fn the_backend_options_arrive() {
    let config = config("--backend-ca ca.pem --backend-name mx --backend-insecure --backend-source 127.0.0.53");
    assert_eq!(config.ca_file, Some("ca.pem".into()));
    assert_eq!(config.backend_name.as_deref(), Some("mx"));
    assert!(config.backend_insecure);
    assert_eq!(config.backend_source, "127.0.0.53".parse().ok());
}

#[test]
fn an_unchecked_backend_must_be_local() {
    for host in ["localhost", "LocalHost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
        assert!(with(&format!("--backend-insecure {host} 1 p"), &[]).unwrap().backend_insecure, "{host}");
    }
    for host in ["mx.example.org", "192.0.2.1", "localhost.example.org", "127.0.0.1.nip.io", "0.0.0.0", "::", "::2"] {
        let what = with(&format!("--backend-insecure {host} 1 p"), &[]).unwrap_err();
        assert!(what.starts_with("--backend-insecure is only for"), "{host}");
    }
}

#[test]
fn the_source_is_an_address_of_the_family_of_host() {
    for source in ["localhost", "127.0.0.256", "127.0.0.1:25", "[::1]"] {
        assert!(refused(&format!("--backend-source {source}")).contains("must be an IP address"), "{source}");
    }
    assert!(with("--backend-source ::1 127.0.0.1 1 p", &[]).is_err());
    assert!(with("--backend-source ::1 localhost 1 p", &[]).is_ok());
    assert!(with("--backend-source ::1 ::1 1 p", &[]).is_ok());
}

#[test]
fn refusals_go_with_require_tls_only_and_may_be_zero() {
    assert_eq!(config("--require-tls").policy.refusals, 1);
    assert_eq!(config("--require-tls --refusals 0").policy.refusals, 0);
    assert_eq!(config("--refusals=7 --require-tls").policy.refusals, 7);
    assert!(refused("--refusals 1").contains("only with --require-tls"));
    for count in ["-1", "+1", "x", "1.5", "4294967296"] {
        assert!(refused(&format!("--require-tls --refusals={count}")).contains("wants a number"), "{count}");
    }
}

#[test]
fn cutoffs_are_added_to_the_default_ones() {
    let cutoff = config("--cutoff helo,Mail,commands=5,seconds=60,VRFY").policy.cutoff;
    let mut verbs = Cutoff::default().verbs;
    verbs.extend([Verb::Helo, Verb::Vrfy]);
    assert_eq!(cutoff, Cutoff { verbs, commands: Some(5), after: Some(Duration::from_secs(60)) });
}

#[test]
fn every_default_cutoff_can_be_named() {
    for verb in Cutoff::default().verbs {
        assert_eq!(config(&format!("--cutoff {}", verb.name())).policy.cutoff, Cutoff::default());
    }
}

#[test]
fn bad_cutoffs_are_refused() {
    for (item, why) in [
        ("STARTTLS", "STARTTLS needs it"),
        ("ehlo", "STARTTLS needs it"),
        ("XCLIENT", "always refused"),
        ("XFORWARD", "always refused"),
        ("GET", "always refused"),
        ("FOO", "takes verbs"),
        ("MAIL,", "takes verbs"),
        ("verbs=MAIL", "takes verbs"),
        ("commands", "takes verbs"),
        ("commands=", "wants a number"),
        ("commands=0", "wants a number"),
        ("seconds=0", "wants a number"),
        ("seconds=+1", "wants a number"),
        ("seconds=1s", "wants a number"),
    ] {
        let what = refused(&format!("--cutoff {item}"));
        assert!(what.starts_with("--cutoff") && what.contains(why), "{item}: {what}");
    }
}

#[test]
fn choices_are_exact() {
    for (word, replay) in [("hello", Replay::Hello), ("all", Replay::All), ("none", Replay::None)] {
        assert_eq!(config(&format!("--replay {word}")).policy.replay, replay);
    }
    assert_eq!(config("--relay copy").relay, RelayMode::Copy);
    assert_eq!(config("--relay splice").relay, RelayMode::Splice);
    assert_eq!(refused("--replay ALL"), "--replay takes hello|all|none, not \"ALL\"");
    assert_eq!(refused("--relay x"), "--relay takes splice|copy, not \"x\"");
}

#[test]
fn each_time_out_arrives_in_its_place() {
    let line = "--snoop-timeout 1 --snoop-total 2 --dial-timeout 3 --backend-handshake-timeout 4 --greeting-timeout 5 \
                --replay-timeout 6 --handshake-timeout 7 --relay-timeout 8 --farewell-timeout 9";
    let seconds = Duration::from_secs;
    let expected = Timeouts {
        snoop: seconds(1),
        snoop_total: seconds(2),
        dial: seconds(3),
        backend_handshake: seconds(4),
        greeting: seconds(5),
        replay: seconds(6),
        handshake: seconds(7),
        relay: seconds(8),
        farewell: seconds(9),
    };
    assert_eq!(config(line).policy.timeouts, expected);
}

#[test]
fn no_time_out_may_be_zero_or_no_number() {
    let names = OPTIONS.iter().filter(|spec| spec.group == crate::cli::options::Group::Timeouts);
    let mut count = 0;
    for spec in names {
        count += 1;
        assert_eq!(refused(&format!("{} 0", spec.called())), format!("{} must be at least 1 second", spec.called()));
        assert!(refused(&format!("{} never", spec.called())).contains("wants a number"));
    }
    assert_eq!(count, 9);
}

#[test]
fn each_letter_is_one_step_from_info() {
    for (letters, level) in [
        ("-qqqq", LevelFilter::Off),
        ("-qqq", LevelFilter::Off),
        ("-qq", LevelFilter::Error),
        ("-q", LevelFilter::Warn),
        ("-vq", LevelFilter::Info),
        ("-v", LevelFilter::Debug),
        ("-v --verbose", LevelFilter::Trace),
        ("-vvvv", LevelFilter::Trace),
    ] {
        assert_eq!(config(letters).verbosity, level, "{letters}");
    }
}

#[test]
fn ids_to_become_are_unprivileged() {
    let ids = with("h 1 p", &[("TLS_UID", "1000"), ("TLS_GID", "1001")]).unwrap();
    assert_eq!((ids.uid, ids.gid), (Some(1000), Some(1001)));
    for id in ["0", "4294967295", "-1", "nobody"] {
        assert!(with("h 1 p", &[("TLS_UID", id)]).unwrap_err().starts_with("TLS_UID"), "{id}");
        assert!(with("h 1 p", &[("TLS_GID", id)]).unwrap_err().starts_with("TLS_GID"), "{id}");
    }
}

#[test]
fn the_backends_name_is_one_that_a_certificate_can_bear() {
    assert_eq!(config("--backend-name mx.example").backend_name.as_deref(), Some("mx.example"));
    for name in ["bad name", "-", "a..b"] {
        let words = ["--backend-name", name, "h", "1", "p"].map(std::ffi::OsString::from);
        let refused = crate::cli::read(words, |_| None).unwrap_err().to_string();
        assert!(refused.contains("--backend-name"), "{refused}");
    }
}

#[test]
fn a_unix_socket_is_for_the_way_that_speaks_in_the_clear() {
    let server = with("--way plain unix:/run/smtp p", &[]).unwrap().server;
    assert_eq!(server, Some(Server::Unix("/run/smtp".into())));
    assert!(with("unix:/run/smtp p", &[]).unwrap_err().contains("only for --way plain"));
    assert!(with("--way plain unix: p", &[]).unwrap_err().contains("wants a path"));
}

#[test]
fn nothing_goes_in_the_clear_over_a_network() {
    for host in ["localhost", "127.0.0.1", "::1"] {
        assert!(with(&format!("--way plain {host} 25 p"), &[]).is_ok(), "{host}");
    }
    for host in ["mx.example.org", "192.0.2.1", "0.0.0.0"] {
        assert!(with(&format!("--way plain {host} 25 p"), &[]).unwrap_err().contains("only for localhost"), "{host}");
    }
}

#[test]
fn options_that_say_nothing_in_a_way_are_refused_and_variables_are_not() {
    let trust = ["--backend-ca x", "--backend-name x", "--backend-insecure", "--backend-handshake-timeout 4"];
    let host = ["--backend-source ::1", "--replay all", "--dial-timeout 4", "--greeting-timeout 4"];
    for (way, words, idle) in [("plain", "localhost 25 p", &trust[..]), ("keep", "p", &[trust, host].concat()[..])] {
        for option in idle {
            let what = with(&format!("--way {way} {option} {words}"), &[]).unwrap_err();
            assert!(what.contains("says nothing with --way"), "{way} {option}: {what}");
        }
        assert!(with(&format!("--way {way} {words}"), &[("CAFILE", "x"), ("CADIR", "y")]).is_ok());
    }
    assert!(with("--way plain --backend-source 127.0.0.53 unix:/x p", &[]).unwrap_err().contains("a UNIX socket"));
    assert_eq!(with("--way keep p", &[]).unwrap().policy.way, Way::Keep);
    for late in ["--listen 127.0.0.1:25", "--greeting file"] {
        let line = format!("--way keep {late} --dial-timeout 3 --greeting-timeout 4 p");
        let timeouts = with(&line, &[]).unwrap().policy.timeouts;
        assert_eq!([timeouts.dial, timeouts.greeting].map(|time| time.as_secs()), [3, 4], "{late}");
    }
}

#[test]
fn errors_and_failed_starttls_are_limited_by_default_for_a_listener_alone() {
    let limits = |line: &str| with(line, &[]).map(|config| (config.policy.max_errors, config.policy.max_starttls));
    assert_eq!(limits("localhost 465 p"), Ok((None, None)));
    assert_eq!(limits("--max-errors 0 --max-starttls 3 localhost 465 p"), Ok((Some(0), Some(3))));
    assert_eq!(limits("--listen 127.0.0.1:25 localhost 465 p"), Ok((Some(20), Some(10))));
    assert_eq!(limits("--listen 127.0.0.1:25 --max-errors 7 localhost 465 p"), Ok((Some(7), Some(10))));
    assert_eq!(refused("--max-errors many"), "--max-errors wants a number up to 4294967295, not \"many\"");
    let why = with("--mute --max-starttls 1 p", &[]).unwrap_err();
    assert!(why.starts_with("--max-starttls says nothing with"), "{why}");
}

#[test]
fn limits_by_address_are_a_listeners_and_at_least_1() {
    let limits = |line: &str| {
        let listen = with(&format!("--listen 127.0.0.1:25 {line} localhost 465 p"), &[])?.listen.unwrap();
        Ok::<_, String>((listen.most_per_address, listen.rate_per_address))
    };
    assert_eq!(limits(""), Ok((None, None)));
    assert_eq!(limits("--max-per-ip 50 --rate-per-ip 5"), Ok((Some(50), Some(5))));
    for option in ["--max-per-ip", "--rate-per-ip"] {
        assert_eq!(limits(&format!("{option} 0")), Err(format!("{option} must be at least 1")));
        assert_eq!(refused(&format!("{option} 1")), format!("{option} is a listener's: --listen is missing"));
    }
}

#[test]
fn a_listener_behind_a_load_balancer_is_told_whose_word_counts() {
    let proxies = |line: &str| {
        let config = with(&format!("--listen 127.0.0.1:25 {line} localhost 465 p"), &[])?;
        Ok::<_, String>(config.listen.unwrap().proxies)
    };
    assert_eq!(proxies(""), Ok(None));
    let networks = ["192.0.2.0/24", "::1"].map(|text| text.parse().unwrap()).to_vec();
    assert_eq!(proxies("--proxy-protocol --proxy-from 192.0.2.0/24,::1"), Ok(Some(networks)));
    for (line, why) in [
        ("--proxy-from ::1", "--proxy-from counts only with --proxy-protocol"),
        ("--proxy-protocol", "--proxy-protocol wants --proxy-from"),
        ("--proxy-protocol --proxy-from lb.example", "\"lb.example\" is no network"),
        ("--proxy-protocol --proxy-from ::1,", "\"\" is no network"),
        ("--proxy-protocol --proxy-from 10.0.0.1/8", "\"10.0.0.1/8\" is an address with bits behind its network"),
        ("--proxy-protocol=yes --proxy-from ::1", "--proxy-protocol"),
    ] {
        let refused = proxies(line).unwrap_err();
        assert!(refused.contains(why), "{line}: {refused}");
    }
    for option in ["--proxy-protocol", "--proxy-from ::1"] {
        let refused = refused(option);
        assert!(refused.ends_with("is a listener's: --listen is missing"), "{refused}");
    }
}
