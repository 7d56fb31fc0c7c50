//! Models from a hub: its layout, redirects, tokens, cuts, and hubs that do not keep their word.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hone_schema::sha256;
use serde_json::json;

use crate::server::{Answer, Request, Server};
use crate::{Ended, MODEL_FILES, fetch, names, tiny_model};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The files of a tiny model, as a hub has them.
fn tiny_files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let model = tiny_model(dir);
    let file = |name: &&str| {
        let name = (*name).to_owned();
        (name.clone(), std::fs::read(model.join(name)).unwrap())
    };
    let mut files: BTreeMap<_, _> =
        MODEL_FILES.iter().filter(|name| **name != "manifest.json").map(file).collect();
    files.insert("README.md".to_owned(), b"a card".to_vec());
    files.insert("onnx/model.onnx".to_owned(), b"another form".to_vec());
    files
}

/// What the hub says about the repository.
fn about(files: &BTreeMap<String, Vec<u8>>) -> Answer {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let mut value = json!({"rfilename": name, "size": bytes.len(), "blobId": "x"});
        if name.ends_with(".safetensors") {
            value["lfs"] = json!({"sha256": sha256(bytes).to_string(), "size": bytes.len()});
        }
        value
    };
    let siblings: Vec<_> = files.iter().map(sibling).collect();
    Answer::ok(json!({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).to_string())
}

/// A hub's answers: the repository `org/tiny` at `main`, small files at once, weights through a
/// redirect to `/blobs/`.
fn hub(files: &BTreeMap<String, Vec<u8>>, request: &Request) -> Answer {
    if request.path == "/api/models/org/tiny/revision/main?blobs=true" {
        return about(files);
    }
    if let Some(name) = request.path.strip_prefix("/blobs/") {
        return part(&files[name], request);
    }
    let name = request.path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/"));
    match name.and_then(|name| files.get(name).map(|bytes| (name, bytes))) {
        None => Answer::status("404 Not Found"),
        Some((name, bytes)) if name.ends_with(".safetensors") => Answer::status("302 Found")
            .with("Location", format!("/blobs/{name}"))
            .with("X-Linked-Size", bytes.len().to_string()),
        Some((_, bytes)) => Answer::ok(bytes.clone()).with("ETag", "\"x\""),
    }
}

/// The part of a file that is asked for.
fn part(bytes: &[u8], request: &Request) -> Answer {
    let start = request
        .header("range")
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match start {
        None => Answer::ok(bytes),
        Some(start) => {
            let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
            let body = bytes[start..].to_vec();
            Answer { status: "206 Partial Content", ..Answer::ok(body) }
                .with("Content-Range", range)
        }
    }
}

/// A directory, the files of a hub, and where the model shall lie.
struct Place {
    dir: tempfile::TempDir,
    files: BTreeMap<String, Vec<u8>>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let files = tiny_files(dir.path());
        Place { dir, files }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn fetch(&self, server: &Server, more: &[(&str, &str)]) -> Ended {
        let endpoint = format!("http://127.0.0.1:{}", server.port);
        let mut variables = vec![("HF_ENDPOINT", endpoint.as_str())];
        variables.extend(more);
        let out = self.out();
        fetch(&["model", "org/tiny", "--out", out.to_str().unwrap()], &variables)
    }

    /// All files of the model arrived as they are.
    fn check_whole(&self) {
        assert_eq!(names(&self.out()), MODEL_FILES);
        for name in MODEL_FILES.iter().filter(|name| **name != "manifest.json") {
            let found = std::fs::read(self.out().join(name)).unwrap();
            assert!(found == self.files[*name], "{name}");
        }
    }

    /// The program refuses, and leaves nothing behind.
    fn check_refused(&self, server: &Server, code: i32, said: &str) {
        self.fetch(server, &[]).check(code, said);
        assert!(!self.out().exists());
    }
}

#[test]
fn a_model_is_fetched_once() {
    let place = Place::new();
    let files = place.files.clone();
    let server = Server::start(move |request, _| hub(&files, request));
    place.fetch(&server, &[]).check(0, "2440 weights in 11 tensors");
    place.check_whole();
    // The answer about the revision, six small files, the redirect and the weights.
    assert_eq!(server.requests().len(), 9);
    place.fetch(&server, &[]).check(0, "fresh");
    assert_eq!(server.requests().len(), 10, "one question more, and no file");
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let place = Place::new();
    let files = place.files.clone();
    let store = Server::start(move |request, _| hub(&files, request));
    let files = place.files.clone();
    let port = store.port;
    let server = Server::start(move |request, _| match request.header("authorization") {
        Some("Bearer secret") if request.path.ends_with(".safetensors") => {
            Answer::status("302 Found")
                .with("Location", format!("http://localhost:{port}/blobs/model.safetensors"))
        }
        Some("Bearer secret") => hub(&files, request),
        _ => Answer::status("401 Unauthorized"),
    });
    place.check_refused(&server, 3, "the hub refuses to give `org/tiny@main`");
    place.fetch(&server, &[("HF_TOKEN", "secret")]).check(0, "2440 weights");
    place.check_whole();
    assert_eq!(store.requests().len(), 1);
    assert_eq!(store.requests()[0].header("authorization"), None);
}

#[test]
fn a_token_file_serves_as_well() {
    let place = Place::new();
    let files = place.files.clone();
    let server = Server::start(move |request, _| match request.header("authorization") {
        Some("Bearer from-file") => hub(&files, request),
        _ => Answer::status("403 Forbidden"),
    });
    let home = place.dir.path().join("hf");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("token"), "from-file\n").unwrap();
    place.fetch(&server, &[("HF_HOME", home.to_str().unwrap())]).check(0, "2440 weights");
}

#[test]
fn a_cut_download_goes_on() {
    let place = Place::new();
    let files = place.files.clone();
    let server = Server::start(move |request, n_same| {
        let mut answer = hub(&files, request);
        if request.path.starts_with("/blobs/") && n_same <= 2 {
            answer.cut_after = Some(1500);
        }
        answer
    });
    place.fetch(&server, &[]).check(0, "2440 weights");
    place.check_whole();
    let ranges: Vec<_> = server
        .requests()
        .iter()
        .filter(|request| request.path.starts_with("/blobs/"))
        .map(|request| request.header("range").map(str::to_owned))
        .collect();
    assert_eq!(ranges, [None, Some("bytes=1500-".to_owned()), Some("bytes=3000-".to_owned())]);
}

#[test]
fn a_hub_without_ranges_sends_all_again() {
    let place = Place::new();
    let files = place.files.clone();
    let server = Server::start(move |request, n_same| {
        let without = Request { headers: Vec::new(), ..request.clone() };
        let mut answer = hub(&files, &without);
        if request.path.starts_with("/blobs/") && n_same == 1 {
            answer.cut_after = Some(1500);
        }
        answer
    });
    place.fetch(&server, &[]).check(0, "2440 weights");
    place.check_whole();
}

#[test]
fn a_download_that_is_always_cut_is_given_up() {
    let place = Place::new();
    let files = place.files.clone();
    let server = Server::start(move |request, n_same| {
        let mut answer = hub(&files, request);
        if request.path.starts_with("/blobs/") {
            answer.cut_after = Some(if n_same == 1 { 1500 } else { 0 });
        }
        answer
    });
    place.check_refused(&server, 4, "`model.safetensors`: the download was cut after 1500 of");
}

#[test]
fn a_busy_hub_is_asked_again() {
    let place = Place::new();
    let files = place.files.clone();
    let server = Server::start(move |request, n_same| {
        if request.path.ends_with("/config.json") && n_same < 3 {
            return Answer::status("503 Service Unavailable");
        }
        hub(&files, request)
    });
    place.fetch(&server, &[]).check(0, "2440 weights");
}

/// A hub whose answer to one path is another one.
fn check_liar(path_end: &'static str, answer: fn(Vec<u8>) -> Answer, code: i32, said: &str) {
    let place = Place::new();
    let files = place.files.clone();
    let server = Server::start(move |request, _| {
        let honest = hub(&files, request);
        if request.path.ends_with(path_end) { answer(honest.body) } else { honest }
    });
    place.check_refused(&server, code, said);
}

#[test]
fn hubs_that_do_not_keep_their_word() {
    let api = "?blobs=true";
    let blob = "/blobs/model.safetensors";
    check_liar(api, |_| Answer::status("404 Not Found"), 3, "`org/tiny@main` is not there");
    check_liar(api, |_| Answer::status("418 Teapot"), 4, "the hub answered 418");
    check_liar(api, |_| Answer::ok("<html>"), 3, "the answer is not a hub's");
    let commit = |_| Answer::ok(r#"{"sha": "../../x", "siblings": []}"#);
    check_liar(api, commit, 3, "its commit is \"../../x\"");
    let empty = |_| Answer::ok(json!({"sha": COMMIT, "siblings": []}).to_string());
    check_liar(api, empty, 3, "`org/tiny` has no file `config.json`");
    check_liar(
        "/tokenizer.json",
        |_| Answer::status("404 Not Found"),
        3,
        "org/tiny/tokenizer.json",
    );
    check_liar("/tokenizer.json", |_| Answer::ok("{}"), 3, "it has 2 bytes, the hub promised");
    check_liar(blob, |body| Answer::ok(&body[1..]), 3, "the hub promised");
    let flipped = |mut body: Vec<u8>| {
        *body.last_mut().unwrap() ^= 1;
        Answer::ok(body)
    };
    check_liar(blob, flipped, 3, "the hub promised");
    // The decoder's refusal comes before the weights are asked for.
    let other = |body: Vec<u8>| {
        Answer::ok(String::from_utf8(body).unwrap().replace("\"llama\"", "\"mamba\""))
    };
    check_liar("/config.json", other, 3, "`model_type` = \"mamba\" is not supported");
}

#[test]
fn nobody_listens() {
    let place = Place::new();
    let out = place.out();
    let args = ["model", "org/tiny", "--out", out.to_str().unwrap()];
    // Port 9 discards, and nobody runs it.
    fetch(&args, &[("HF_ENDPOINT", "http://127.0.0.1:9")])
        .check(4, "http://127.0.0.1:9/api/models/");
    fetch(&args, &[("HF_ENDPOINT", "ftp://x")]).check(2, "neither https:// nor http://");
    let certificates =
        [("SSL_CERT_FILE", "/nowhere/x.pem"), ("HF_ENDPOINT", "https://127.0.0.1:9")];
    fetch(&args, &certificates).check(2, "SSL_CERT_FILE");
}

#[test]
fn the_hubs_own_cache_is_used() {
    let place = Place::new();
    let home = place.dir.path().join("hf");
    let repo = home.join("hub/models--org--tiny");
    let snapshot = repo.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    for (name, bytes) in place.files.iter().filter(|(name, _)| !name.contains('/')) {
        std::fs::write(snapshot.join(name), bytes).unwrap();
    }
    let files = place.files.clone();
    let server = Server::start(move |request, _| hub(&files, request));
    let variables = [("HF_HOME", home.to_str().unwrap())];
    place.fetch(&server, &variables).check(0, "2440 weights");
    place.check_whole();
    let asked = server.requests();
    assert!(asked.iter().all(|request| !request.path.ends_with(".safetensors")), "{asked:?}");
    let n_asked = asked.len();
    std::fs::remove_dir_all(place.out()).unwrap();
    let offline = [variables[0], ("HF_HUB_OFFLINE", "1")];
    place.fetch(&server, &offline).check(0, "2440 weights");
    place.check_whole();
    assert_eq!(server.requests().len(), n_asked, "nobody was asked");
    std::fs::remove_dir_all(place.out()).unwrap();
    std::fs::remove_dir_all(&snapshot).unwrap();
    place.fetch(&server, &offline).check(3, "is not in the hub's cache");
}
