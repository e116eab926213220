//! Who may sign a backend's certificate: files that are opened at the start, and read when a certificate first has to be checked.
//!
//! Contract: the usual backend shows our own leaf, and then nothing of this is read: the system's roots would cost 4.6 ms. What is
//! one file (a bundle, CAFILE) is opened before the sandbox, which then need not let anything be opened; a folder's files can only
//! be opened when they are read. A file that can't be opened or read is a reason in the refusal, not before.

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls_native_certs::load_certs_from_paths;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where systems keep all their roots in one file: Debian, Arch, Gentoo; Fedora; its forebears; SUSE; Alpine.
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Where they keep them one by one.
const FOLDER: &str = "/etc/ssl/certs";

/// Certificates of those who may vouch; of nobody by default.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    file: Option<Arc<Opened>>,
    folders: Vec<PathBuf>,
    /// Whether they are believed when shown themselves, even if they call themselves a CA, as `openssl req -x509` has it.
    are_listed: bool,
}

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    file: io::Result<File>,
}

impl Roots {
    /// The certificates in a PEM file (CAFILE) and in all PEM files of a folder (CADIR). A self-signed certificate that is listed
    /// itself is believed too.
    #[must_use]
    pub fn listed(file: Option<&Path>, folder: Option<&Path>) -> Self {
        Self { file: file.map(opened), folders: folder.into_iter().map(PathBuf::from).collect(), are_listed: true }
    }

    /// What this system trusts: its bundle, or its folder where it has none; or what SSL_CERT_FILE and SSL_CERT_DIR name, as `variable`
    /// gives them.
    #[must_use]
    pub fn system(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Self {
        let (file, folders) = (variable("SSL_CERT_FILE"), variable("SSL_CERT_DIR"));
        let bundle = || BUNDLES.iter().map(|path| opened(Path::new(path))).find(|bundle| bundle.file.is_ok());
        let (file, folders) = match (file, folders) {
            (None, None) => match bundle() {
                Some(bundle) => (Some(bundle), Vec::new()),
                None => (None, vec![FOLDER.into()]),
            },
            (file, folders) => {
                let folders = folders.map(|list| std::env::split_paths(&list).collect());
                (file.as_deref().map(|path| opened(Path::new(path))), folders.unwrap_or_default())
            }
        };
        Self { file, folders, are_listed: false }
    }

    /// Folders whose files will be opened when the roots are read.
    #[must_use]
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    pub(super) fn read(&self) -> ReadRoots {
        let mut found = Vec::new();
        let mut trouble = None;
        if let Some(opened) = &self.file {
            let read = opened.file.as_ref().map_err(ToString::to_string).and_then(|file| from_file(file, &mut found));
            trouble = read.err().map(|error| format!("{}: {error}", opened.path.display()));
        }
        for folder in &self.folders {
            let more = load_certs_from_paths(None, Some(folder));
            found.extend(more.certs);
            trouble = trouble.or_else(|| more.errors.first().map(ToString::to_string));
        }
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(found.iter().cloned());
        ReadRoots { store, listed: if self.are_listed { found } else { Vec::new() }, trouble }
    }
}

/// [`Roots`] as they were found.
#[derive(Debug)]
pub(super) struct ReadRoots {
    pub(super) store: RootCertStore,
    /// Certificates that are believed when shown themselves; empty for the system's roots.
    pub(super) listed: Vec<CertificateDer<'static>>,
    /// What went wrong while reading.
    pub(super) trouble: Option<String>,
}

fn opened(path: &Path) -> Arc<Opened> {
    Arc::new(Opened { path: path.to_owned(), file: File::open(path) })
}

/// The certificates of a PEM file, as far as it goes.
fn from_file(file: &File, found: &mut Vec<CertificateDer<'static>>) -> Result<(), String> {
    for certificate in CertificateDer::pem_reader_iter(BufReader::new(FromStart { file, at: 0 })) {
        found.push(certificate.map_err(|error| error.to_string())?);
    }
    Ok(())
}

/// Reads a file without its offset, which a second hand-over of the session would find at the end.
struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(room, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}
