//! The hub's protocol: what a repository holds at a revision, and its files.
//!
//! `GET /api/models/{repo}/revision/{revision}?blobs=true` names the commit, and every file with
//! its length and, for large files, its SHA-256. `GET /{repo}/resolve/{commit}/{file}` answers with
//! the file, or with a redirect to where it lies. Everything is fetched from that one commit, so
//! that a branch that moves meanwhile does no harm. A download that is cut goes on where it was
//! cut; what arrives must have the length and the hash that the hub promised.
//!
//! Protocol: <https://huggingface.co/docs/hub/api>. The redirect's other host never sees the token.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hone_cli::Failure;
use hone_store::input;
use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use crate::args::HubId;

/// Where models are when HF_ENDPOINT says nothing.
const ENDPOINT_DEFAULT: &str = "https://huggingface.co";

/// Longest answer about a repository: room for fifty thousand files.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// How often a download that makes no progress is tried.
const TRIES_MAX: u32 = 4;

/// Pause before the second try of those; the further ones wait a multiple of it.
const PAUSE: Duration = Duration::from_millis(300);

/// Longest silence of a server before the connection counts as cut.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Longest token file read.
const TOKEN_BYTES_MAX: u64 = 4096;

/// Longest file of certificates read.
const CERTIFICATES_BYTES_MAX: u64 = 8 << 20;

/// Bytes copied at a time.
const BLOCK: usize = 1 << 17;

/// What the environment says about hubs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// Address of the hub, without a slash at its end.
    pub(crate) endpoint: String,
    /// Proof of who asks.
    pub(crate) token: Option<String>,
    /// Directory of the hub's own cache, if it is known where one would be.
    pub(crate) cache: Option<PathBuf>,
    /// Whether only the cache may be used.
    pub(crate) is_offline: bool,
    /// Certificates to trust instead of the usual ones.
    pub(crate) certificates: Option<PathBuf>,
}

impl Settings {
    /// Reads the variables of the Hugging Face tools, through `get`.
    pub(crate) fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let user_cache =
            || path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
        let home = path("HF_HOME").or_else(|| user_cache().map(|dir| dir.join("huggingface")));
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|h| h.join("token")));
        let token = get("HF_TOKEN").or_else(|| {
            let bytes = input::read(&token_file?, TOKEN_BYTES_MAX).ok()?;
            String::from_utf8(bytes).ok()
        });
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT_DEFAULT.to_owned());
        Settings {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(|t| t.trim().to_owned()).filter(|token| !token.is_empty()),
            cache: path("HF_HUB_CACHE").or_else(|| home.map(|home| home.join("hub"))),
            is_offline: get("HF_HUB_OFFLINE").is_some_and(|value| value != "0"),
            certificates: path("SSL_CERT_FILE"),
        }
    }

    /// The directory in which the hub's own tools have put `id`, if they have.
    pub(crate) fn cached(&self, id: &HubId) -> Option<PathBuf> {
        let repo = format!("models--{}", id.repo.replace('/', "--"));
        let dir = self.cache.as_ref()?.join(repo);
        let named = input::read(&dir.join("refs").join(&id.revision), TOKEN_BYTES_MAX).ok();
        let commit = match named {
            Some(bytes) => String::from_utf8(bytes).ok()?.trim().to_owned(),
            None => id.revision.clone(),
        };
        let snapshot = dir.join("snapshots").join(commit);
        input::is_dir(&snapshot).then_some(snapshot)
    }
}

/// What goes wrong between here and the hub.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HubError {
    /// No repository, revision or file of that name.
    #[error("`{0}` is not there")]
    NotFound(String),
    /// The hub wants to know who asks, or does not let this one in.
    #[error("the hub refuses to give `{0}`")]
    Refused(String),
    /// Another answer than success.
    #[error("`{url}`: the hub answered {status}")]
    Status { url: String, status: StatusCode },
    /// No answer.
    #[error("`{url}`: {reason}")]
    Connection { url: String, reason: String },
    /// An answer that makes no sense.
    #[error("`{url}`: the answer is not a hub's: {reason}")]
    Answer { url: String, reason: String },
    /// The download ended early, again and again.
    #[error("`{file}`: the download was cut after {found} of {expected} bytes")]
    Cut { file: String, found: u64, expected: u64 },
    /// A file that is not the one that the hub promised.
    #[error("`{file}`: {what}")]
    Wrong { file: String, what: String },
    /// The address or the certificates cannot be used.
    #[error("{0}")]
    Settings(String),
    /// What arrived cannot be written.
    #[error("cannot write `{file}`: {source}")]
    Write { file: String, source: std::io::Error },
    /// A signal asked to stop.
    #[error("stopped")]
    Stopped,
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        let message = error.to_string();
        match error {
            HubError::NotFound(_) => Failure::input(message)
                .hint("check the name and the revision; private models need HF_TOKEN"),
            HubError::Refused(_) => Failure::input(message).hint(
                "set HF_TOKEN to a token that may read it, and accept the licence on its page",
            ),
            HubError::Wrong { .. } | HubError::Answer { .. } => Failure::input(message)
                .hint("the copy of the hub may be damaged; check HF_ENDPOINT, or try again"),
            HubError::Settings(_) => Failure::usage(message),
            HubError::Write { .. } => Failure::environment(message),
            HubError::Status { .. } | HubError::Connection { .. } | HubError::Cut { .. } => {
                Failure::environment(message).hint("check the network and HF_ENDPOINT, try again")
            }
            HubError::Stopped => Failure::environment(message),
        }
    }
}

impl HubError {
    /// Whether the same request may well succeed a moment later.
    fn may_pass(&self) -> bool {
        match self {
            HubError::Connection { .. } | HubError::Cut { .. } => true,
            HubError::Status { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            _ => false,
        }
    }
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// Its name in the repository.
    pub(crate) name: String,
    /// Its length, if the hub says.
    pub(crate) n_bytes: Option<u64>,
    /// Its SHA-256 in hexadecimal, if the hub says (it does for large files).
    pub(crate) sha256: Option<String>,
}

/// A repository at one commit.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// `organisation/name`.
    pub(crate) repo: String,
    /// The commit.
    pub(crate) commit: String,
    /// Its files.
    pub(crate) files: Vec<RemoteFile>,
}

impl Snapshot {
    /// The file of that name.
    pub(crate) fn file(&self, name: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|file| file.name == name)
    }
}

/// A hub that can be asked.
pub(crate) struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// A form of the answer about a revision, as far as it matters.
#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Hub {
    /// Prepares to ask; connects to nothing.
    pub(crate) fn new(settings: &Settings) -> Result<Self, HubError> {
        let endpoint = settings.endpoint.clone();
        let is_https = endpoint.starts_with("https://");
        if !is_https && !endpoint.starts_with("http://") {
            let what = format!("HF_ENDPOINT = `{endpoint}` is neither https:// nor http://");
            return Err(HubError::Settings(what));
        }
        // A token sent in clear text is a token given away; to this very machine it is not sent
        // anywhere.
        let token = settings.token.clone().filter(|_| is_https || is_local(&endpoint));
        let tls = TlsConfig::builder().root_certs(root_certs(settings.certificates.as_deref())?);
        let agent = Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .accept_encoding("identity")
            .user_agent(concat!("hone/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(SILENCE_MAX))
            .timeout_per_read(Some(SILENCE_MAX))
            .build()
            .new_agent();
        Ok(Hub { agent, endpoint, token })
    }

    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let reason = |error: ureq::Error| error.to_string();
        request
            .call()
            .map_err(|error| HubError::Connection { url: url.to_owned(), reason: reason(error) })
    }

    /// Asks which commit `id` is, and what files it has.
    pub(crate) fn snapshot(&self, id: &HubId) -> Result<Snapshot, HubError> {
        let revision = id.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.endpoint, id.repo);
        let url = format!("{url}?blobs=true");
        let mut response = self.get(&url, 0)?;
        accept(&url, &format!("{}@{}", id.repo, id.revision), response.status())?;
        let wrong = |reason: String| HubError::Answer { url: url.clone(), reason };
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX);
        let bytes = body.read_to_vec().map_err(|error| wrong(error.to_string()))?;
        let answer: Answer =
            serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        let is_commit = answer.sha.len() >= 7 && answer.sha.chars().all(|c| c.is_ascii_hexdigit());
        if !is_commit {
            return Err(wrong(format!("its commit is {:?}", answer.sha)));
        }
        let file = |sibling: Sibling| {
            let (lfs_size, sha256) = sibling.lfs.map_or((None, None), |lfs| (lfs.size, lfs.sha256));
            RemoteFile { name: sibling.rfilename, n_bytes: lfs_size.or(sibling.size), sha256 }
        };
        let files = answer.siblings.into_iter().map(file).collect();
        Ok(Snapshot { repo: id.repo.clone(), commit: answer.sha, files })
    }

    /// Fetches a file into `out`, going on after cuts, and checks its length. `step` hears how many
    /// bytes came, and answers whether to go on. Returns the number of bytes.
    pub(crate) fn download(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        out: &mut dyn Write,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<u64, HubError> {
        let (repo, commit) = (&snapshot.repo, &snapshot.commit);
        let url = format!("{}/{repo}/resolve/{commit}/{}", self.endpoint, file.name);
        let mut transfer = Transfer { file, expected: file.n_bytes, found: 0, out, step };
        let mut tries_left = TRIES_MAX;
        loop {
            let before = transfer.found;
            let answer = self.get(&url, before).and_then(|response| {
                accept(&url, &format!("{repo}/{}", file.name), response.status())?;
                transfer.take(response)
            });
            let error = match answer {
                Ok(true) => return Ok(transfer.found),
                Ok(false) => transfer.cut(),
                Err(error) if error.may_pass() => error,
                Err(error) => return Err(error),
            };
            tries_left = if transfer.found > before { TRIES_MAX } else { tries_left - 1 };
            if tries_left == 0 {
                return Err(error);
            }
            std::thread::sleep(PAUSE * (TRIES_MAX - tries_left));
        }
    }
}

/// A file that is arriving.
struct Transfer<'a> {
    file: &'a RemoteFile,
    /// Its whole length, once anyone has said.
    expected: Option<u64>,
    /// Bytes that have arrived and are written.
    found: u64,
    out: &'a mut dyn Write,
    step: &'a mut dyn FnMut(u64) -> bool,
}

impl Transfer<'_> {
    /// Takes what one answer brings. Says whether the file is whole now.
    fn take(&mut self, response: Response<Body>) -> Result<bool, HubError> {
        // A server that knows no ranges sends the file from its beginning again.
        let is_part = response.status() == StatusCode::PARTIAL_CONTENT;
        let mut skip = if is_part { 0 } else { self.found };
        if is_part && part_start(&response) != Some(self.found) {
            return Err(
                self.wrong(format!("asked from byte {}, the hub sent another part", self.found))
            );
        }
        let promised = response.body().content_length().map(|n| n + self.found - skip);
        match (self.expected, promised) {
            (Some(expected), Some(promised)) if expected != promised => {
                let what = format!("it has {promised} bytes, the hub promised {expected}");
                return Err(self.wrong(what));
            }
            (None, promised) => self.expected = promised,
            _ => {}
        }
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut block = vec![0; BLOCK];
        loop {
            let n = match body.read(&mut block) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return Ok(false),
            };
            let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(n);
            skip -= skipped as u64;
            self.put(&block[skipped..n])?;
        }
        // A server that names no length says by its end that the file is whole.
        Ok(self.expected.is_none_or(|expected| self.found >= expected))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.found += bytes.len() as u64;
        if self.expected.is_some_and(|expected| self.found > expected) {
            let expected = self.expected.unwrap_or_default();
            return Err(self.wrong(format!("more than the promised {expected} bytes came")));
        }
        let file = || self.file.name.clone();
        self.out.write_all(bytes).map_err(|source| HubError::Write { file: file(), source })?;
        if (self.step)(bytes.len() as u64) { Ok(()) } else { Err(HubError::Stopped) }
    }

    fn cut(&self) -> HubError {
        let (found, expected) = (self.found, self.expected.unwrap_or_default());
        HubError::Cut { file: self.file.name.clone(), found, expected }
    }

    fn wrong(&self, what: String) -> HubError {
        HubError::Wrong { file: self.file.name.clone(), what }
    }
}

/// Turns the status of an answer into an error, if it is one.
fn accept(url: &str, what: &str, status: StatusCode) -> Result<(), HubError> {
    match status {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(()),
        StatusCode::NOT_FOUND => Err(HubError::NotFound(what.to_owned())),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(HubError::Refused(what.to_owned())),
        status => Err(HubError::Status { url: url.to_owned(), status }),
    }
}

/// First byte of a partial answer: 100 in `Content-Range: bytes 100-199/200`.
fn part_start(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

/// Whether an address without encryption stays on this machine.
fn is_local(endpoint: &str) -> bool {
    let rest = endpoint.trim_start_matches("http://");
    let host = rest.split(['/', ':']).next().unwrap_or_default();
    host == "localhost" || host == "127.0.0.1" || rest.starts_with("[::1]")
}

/// The certificates to trust: those of the file that SSL_CERT_FILE names, else those of the web.
fn root_certs(path: Option<&Path>) -> Result<RootCerts, HubError> {
    let Some(path) = path else { return Ok(RootCerts::WebPki) };
    let wrong = |reason: String| {
        HubError::Settings(format!("SSL_CERT_FILE = `{}`: {reason}", path.display()))
    };
    let bytes = input::read(path, CERTIFICATES_BYTES_MAX).map_err(|e| wrong(e.to_string()))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&bytes) {
        if let PemItem::Certificate(certificate) = item.map_err(|e| wrong(e.to_string()))? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        return Err(wrong("it holds no certificates".to_owned()));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        let get = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        Settings::from_variables(get)
    }

    #[test]
    fn variables_are_read_as_the_hubs_own_tools_read_them() {
        let empty = settings(&[]);
        assert_eq!(empty.endpoint, ENDPOINT_DEFAULT);
        assert_eq!((empty.token, empty.cache, empty.is_offline), (None, None, false));
        let home = settings(&[("HOME", "/h"), ("HF_TOKEN", " t\n"), ("HF_ENDPOINT", "http://x/")]);
        assert_eq!(home.cache, Some("/h/.cache/huggingface/hub".into()));
        assert_eq!((home.token.as_deref(), home.endpoint.as_str()), (Some("t"), "http://x"));
        let cache = |variables| settings(variables).cache.unwrap();
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/hf")]), Path::new("/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert!(settings(&[("HF_HUB_OFFLINE", "1")]).is_offline);
        assert!(!settings(&[("HF_HUB_OFFLINE", "0")]).is_offline);
        assert_eq!(settings(&[("HF_TOKEN", "")]).token, None);
    }

    #[test]
    fn a_token_never_travels_in_clear_text() {
        let token = |endpoint: &str| {
            let token = Some("t".to_owned());
            let settings = Settings { endpoint: endpoint.to_owned(), token, ..Settings::default() };
            Hub::new(&settings).map(|hub| hub.token.is_some()).map_err(|error| error.to_string())
        };
        assert_eq!(token("https://hub.example"), Ok(true));
        assert_eq!(token("http://hub.example"), Ok(false));
        assert_eq!(token("http://localhost.example"), Ok(false));
        assert_eq!(token("http://localhost:8080"), Ok(true));
        assert_eq!(token("http://127.0.0.1:1/prefix"), Ok(true));
        assert_eq!(token("http://[::1]:1"), Ok(true));
        assert!(token("hub.example").unwrap_err().contains("neither https:// nor http://"));
    }
}
