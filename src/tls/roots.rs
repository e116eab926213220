//! Who may sign a backend's certificate: files that are opened at the start, and read when a certificate first has to be checked.
//!
//! Contract: the usual backend shows our own leaf, and then nothing of this is read: the system's roots would cost 4.6 ms. What is
//! one file (a bundle, CAFILE) is opened before the sandbox, which then need not let anything be opened; a folder's files can only
//! be opened when they are read. A file that can't be opened or read is a reason in the refusal, not before; but where it is read again
//! ([`Roots::again`]) at once.

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls_native_certs::load_certs_from_paths;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

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
    /// What is in it, where that is kept.
    kept: OnceLock<Content>,
}

/// The certificates of a file, as far as it goes, and what went wrong.
type Content = (Vec<CertificateDer<'static>>, Option<String>);

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

    /// The file that is read, if there is one.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.file.as_ref().map(|opened| opened.path.as_path())
    }

    /// Reads the file now: what becomes of it later is of no account.
    pub fn keep(&self) {
        if let Some(opened) = &self.file {
            opened.kept.get_or_init(|| opened.content());
        }
    }

    /// The same roots, their file as `open` opens it now, and read.
    ///
    /// # Errors
    /// It can't be opened or read, or there is no certificate in it.
    pub fn again(&self, open: impl FnOnce(&Path) -> io::Result<File>) -> Result<Self, String> {
        let Some(old) = &self.file else { return Ok(self.clone()) };
        let new = Opened { path: old.path.clone(), file: open(&old.path), kept: OnceLock::new() };
        match new.kept.get_or_init(|| new.content()) {
            (_, Some(why)) => Err(why.clone()),
            (found, None) if found.is_empty() => Err(format!("{}: no certificate in it", new.path.display())),
            (_, None) => Ok(Self { file: Some(Arc::new(new)), ..self.clone() }),
        }
    }

    pub(super) fn read(&self) -> ReadRoots {
        let (mut found, mut trouble) = match &self.file {
            Some(opened) => opened.kept.get().cloned().unwrap_or_else(|| opened.content()),
            None => (Vec::new(), None),
        };
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
    Arc::new(Opened { path: path.to_owned(), file: File::open(path), kept: OnceLock::new() })
}

impl Opened {
    fn content(&self) -> Content {
        let mut found = Vec::new();
        let mut read = |file: &File| {
            for certificate in CertificateDer::pem_reader_iter(BufReader::new(FromStart { file, at: 0 })) {
                found.push(certificate.map_err(|error| error.to_string())?);
            }
            Ok(())
        };
        let outcome = self.file.as_ref().map_err(ToString::to_string).and_then(&mut read);
        (found, outcome.err().map(|error| format!("{}: {error}", self.path.display())))
    }
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
