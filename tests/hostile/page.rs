//! What a listener serves on `--metrics`, read as strictly as Prometheus' text format lets one.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::wire::PATIENCE;

/// One answer: its head and its body.
pub(crate) fn ask(address: SocketAddr, request: &str) -> (String, String) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // One that is turned away before its end need not take all of it.
    let _ = socket.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    answer.split_once("\r\n\r\n").map(|(head, body)| (head.to_owned(), body.to_owned())).unwrap_or_default()
}

pub(crate) fn status(address: SocketAddr, request: &str) -> String {
    ask(address, request).0.lines().next().unwrap_or_default().to_owned()
}

/// What is served, read as strictly as the format (Prometheus' text format 0.0.4) lets one.
#[derive(Default)]
pub(crate) struct Page {
    /// By name and labels, without the prefix.
    pub(crate) samples: BTreeMap<String, f64>,
    /// By name: the type, and the names of the labels.
    pub(crate) families: BTreeMap<String, (String, Vec<String>)>,
}

impl Page {
    pub(crate) fn of(address: SocketAddr) -> Self {
        let (head, body) = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
        assert!(head.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{head}");
        Self::read(&body)
    }

    fn read(text: &str) -> Self {
        let mut page = Self::default();
        let (mut name, mut kind) = ("", "");
        assert!(text.ends_with('\n'));
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let typed =
                    lines.next().and_then(|line| line.strip_prefix("# TYPE ")).unwrap_or_else(|| panic!("{line}"));
                (name, kind) = typed.split_once(' ').unwrap();
                assert!(help.strip_prefix(name).is_some_and(|help| help.starts_with(' ') && help.len() > 3), "{line}");
                assert!(name.bytes().all(|octet| octet.is_ascii_lowercase() || octet == b'_'), "{line}");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{typed}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{typed}");
                let short = name.strip_prefix("starttls_wrapper_").unwrap_or_else(|| panic!("{name}"));
                let twice = page.families.insert(short.to_owned(), (kind.to_owned(), Vec::new()));
                assert!(twice.is_none(), "{name} twice");
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
            let own = series.split('{').next().unwrap();
            let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.iter().any(|suffix| own.strip_suffix(suffix) == Some(name)), "{line} in {name}");
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(value >= 0.0, "{line}");
            let mut labels = Vec::new();
            if let Some(inner) = series.strip_prefix(own).filter(|rest| !rest.is_empty()) {
                let inner = inner.strip_prefix('{').and_then(|inner| inner.strip_suffix('}')).unwrap();
                for label in inner.split(',') {
                    let (label, word) = label.split_once('=').unwrap();
                    let word = word.strip_prefix('"').and_then(|word| word.strip_suffix('"')).unwrap();
                    assert!(!word.is_empty() && !word.contains(['"', '\\']), "{line}");
                    labels.push(label.to_owned());
                }
            }
            labels.retain(|label| label != "le");
            let family = page.families.get_mut(&name["starttls_wrapper_".len()..]).unwrap();
            assert!(family.1.is_empty() || family.1 == labels, "{line}");
            family.1 = labels;
            let twice = page.samples.insert(series["starttls_wrapper_".len()..].to_owned(), value);
            assert!(twice.is_none(), "{series} twice");
        }
        page.check_histograms();
        page
    }

    /// Buckets grow, and the last holds all.
    fn check_histograms(&self) {
        for (series, count) in self.samples.iter().filter(|(series, _)| series.starts_with("step_seconds_count")) {
            let inside = &series["step_seconds_count{".len()..series.len() - 1];
            let bucket = format!("step_seconds_bucket{{{inside},le=\"");
            let buckets = self.samples.iter().filter_map(|(series, value)| {
                let bound = series.strip_prefix(&bucket)?.strip_suffix("\"}")?;
                Some((bound.parse::<f64>().unwrap(), *value))
            });
            let mut buckets: Vec<(f64, f64)> = buckets.collect();
            buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
            assert!(buckets.len() > 1 && buckets.windows(2).all(|two| two[0].1 <= two[1].1), "{series}: {buckets:?}");
            assert_eq!(buckets.last(), Some(&(f64::INFINITY, *count)), "{series}");
        }
    }

    pub(crate) fn value(&self, series: &str) -> f64 {
        *self.samples.get(series).unwrap_or_else(|| panic!("no {series}"))
    }

    /// One family, whatever its labels.
    pub(crate) fn sum(&self, family: &str) -> f64 {
        let is_its = |series: &str| series.split('{').next() == Some(family);
        self.samples.iter().filter(|(series, _)| is_its(series)).map(|(_, value)| value).sum()
    }

    /// Sessions at present, in whatever state.
    pub(crate) fn sessions(&self) -> f64 {
        self.sum("sessions")
    }

    /// All that is not 0, but for what tells of time and of the process.
    pub(crate) fn counted(&self) -> BTreeMap<&str, u64> {
        let others = [
            "build_info",
            "start_time_seconds",
            "loops",
            "sessions_limit",
            "places_taken",
            "step_seconds_bucket",
            "step_seconds_sum",
            "plaintext_server_",
            "bytes_total",
        ];
        self.samples
            .iter()
            .filter(|(series, value)| **value != 0.0 && !others.iter().any(|other| series.starts_with(other)))
            .map(|(series, value)| (series.as_str(), *value as u64))
            .collect()
    }
}
