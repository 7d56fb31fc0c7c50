//! The protocol, tried: what appears, what does not, what is refused.

use std::fs;
use std::io::Write;
use std::path::Path;

use hone_schema::{ArtefactKind, Conversation, Ledger, Program, Split, sha256};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    Draft, ErrorClass, ModelDir, Seal, Sealed, StoreError, children, input, remove_sealed,
    sweep_all,
};

fn seal(stage: &str) -> Seal {
    Seal {
        kind: ArtefactKind::Files,
        stage: stage.to_owned(),
        key: sha256(stage.as_bytes()),
        program: Program { version: "0".into(), sha256: sha256(b"p") },
        config: Value::Null,
        inputs: vec![],
        ledger: Ledger::default(),
        report: Value::Null,
    }
}

fn sealed(dir: &Path, text: &str) -> Sealed {
    let draft = Draft::open(dir).unwrap();
    draft.write("a.txt", text.as_bytes(), Some(1)).unwrap();
    draft.seal(seal("s")).unwrap()
}

/// Visible names in a directory, and hidden ones other than locks.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !name.ends_with(".lock"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_draft_is_invisible_until_sealed_and_gone_when_dropped() {
    let temp = TempDir::new().unwrap();
    let target = temp.path().join("runs/p/train");
    let draft = Draft::open(&target).unwrap();
    draft.write("a.txt", b"abc", None).unwrap();
    assert!(!target.exists());
    drop(draft);
    assert_eq!(names(target.parent().unwrap()), [""; 0]);

    let sealed = sealed(&target, "abc");
    assert_eq!(names(target.parent().unwrap()), ["train"]);
    assert_eq!(names(&target), ["a.txt", "manifest.json"]);
    assert_eq!(sealed.read("a.txt").unwrap(), b"abc");
    assert_eq!(sealed.manifest().file("a.txt").unwrap().rows, Some(1));
}

#[test]
fn sealing_again_replaces_the_whole_directory() {
    let temp = TempDir::new().unwrap();
    let target = temp.path().join("x");
    sealed(&target, "old");
    let draft = Draft::open(&target).unwrap();
    draft.write("b.txt", b"new", None).unwrap();
    assert_eq!(Sealed::open_any(&target).unwrap().read("a.txt").unwrap(), b"old");
    draft.seal(seal("s")).unwrap();
    assert_eq!(names(temp.path()), ["x"]);
    assert_eq!(names(&target), ["b.txt", "manifest.json"]);
}

#[test]
fn a_second_writer_is_refused_by_name_and_a_dead_ones_scratch_is_cleared() {
    let temp = TempDir::new().unwrap();
    let target = temp.path().join("x");
    let first = Draft::open(&target).unwrap();
    let error = Draft::open(&target).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Environment);
    let pid = std::process::id().to_string();
    assert!(matches!(&error, StoreError::Locked { pid: holder, .. } if *holder == pid), "{error}");
    drop(first);
    fs::create_dir(temp.path().join(".x.draft-1")).unwrap();
    fs::write(temp.path().join(".x.draft-1/half"), b"...").unwrap();
    sealed(&target, "abc");
    assert_eq!(names(temp.path()), ["x"]);
}

#[test]
fn nothing_of_somebody_else_is_replaced() {
    let temp = TempDir::new().unwrap();
    for (name, make) in [("file", true), ("full", false)] {
        let target = temp.path().join(name);
        if make {
            fs::write(&target, b"mine").unwrap();
        } else {
            fs::create_dir(&target).unwrap();
            fs::write(target.join("mine"), b"mine").unwrap();
        }
        let error = Draft::open(&target).unwrap_err();
        assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
    }
    fs::create_dir(temp.path().join("empty")).unwrap();
    sealed(&temp.path().join("empty"), "abc");
}

fn check_damage(damage: impl Fn(&Path), message: &str) {
    let temp = TempDir::new().unwrap();
    let target = temp.path().join("x");
    sealed(&target, "abc");
    damage(&target);
    let error = Sealed::open(&target, ArtefactKind::Files)
        .and_then(|sealed| sealed.read("a.txt").and_then(|_| sealed.file("a.txt")))
        .unwrap_err();
    assert_eq!(error.class(), ErrorClass::Input, "{error}");
    assert!(error.to_string().contains(message), "{error}");
}

#[test]
fn what_was_changed_is_refused() {
    check_damage(|dir| fs::write(dir.join("a.txt"), b"abd").unwrap(), "its hash was");
    check_damage(|dir| fs::write(dir.join("a.txt"), b"abcd").unwrap(), "it had 3 bytes, it has 4");
    check_damage(|dir| fs::remove_file(dir.join("a.txt")).unwrap(), "does not exist");
    check_damage(|dir| fs::remove_file(dir.join("manifest.json")).unwrap(), "no manifest.json");
    check_damage(|dir| fs::remove_dir_all(dir).unwrap(), "does not exist");
    check_damage(
        |dir| {
            fs::rename(dir.join("a.txt"), dir.with_file_name("b.txt")).unwrap();
            std::os::unix::fs::symlink("../b.txt", dir.join("a.txt")).unwrap();
        },
        "not a regular file",
    );
    check_damage(
        |dir| {
            let text = fs::read_to_string(dir.join("manifest.json")).unwrap();
            fs::write(dir.join("manifest.json"), text.replace("a.txt", "../b")).unwrap();
        },
        "letters, digits",
    );
}

#[test]
fn one_flipped_bit_anywhere_is_found() {
    let temp = TempDir::new().unwrap();
    let target = temp.path().join("x");
    let sealed = sealed(&target, &"0123456789".repeat(50));
    let path = target.join("a.txt");
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        assert!(sealed.read("a.txt").is_err() && sealed.file("a.txt").is_err(), "bit in byte {at}");
    }
}

#[test]
fn tables_read_back() {
    let temp = TempDir::new().unwrap();
    let row = Conversation {
        id: "a".into(),
        source: "s".into(),
        source_row: 1,
        split: Split::Train,
        kind: hone_schema::Kind::Text,
        messages: "[]".into(),
        tools: None,
        variables: None,
        text: Some("hello".into()),
        weight: 1.0,
        chosen: None,
        rejected: None,
        meta: None,
    };
    let rows = vec![row; 3];
    let batch = Conversation::to_batch(&rows).unwrap();
    let draft = Draft::open(&temp.path().join("x")).unwrap();
    let mut parquet = draft.parquet("a.parquet", Conversation::schema()).unwrap();
    parquet.write(&batch).unwrap();
    parquet.finish().unwrap();
    let mut ipc = draft.ipc("a.arrow", Conversation::schema()).unwrap();
    ipc.write(&batch).unwrap();
    ipc.finish().unwrap();
    let sealed = draft.seal(seal("s")).unwrap();
    assert_eq!(sealed.manifest().file("a.parquet").unwrap().rows, Some(3));
    let batches = sealed.parquet("a.parquet").unwrap();
    assert_eq!(batches.rows(Conversation::from_batch).unwrap(), rows);
    let found = sealed.ipc("a.arrow").unwrap();
    assert_eq!(Conversation::from_batch(&found[0]).unwrap(), rows);
}

#[test]
fn a_file_that_was_begun_and_not_finished_is_not_sealed() {
    let temp = TempDir::new().unwrap();
    let target = temp.path().join("x");
    let draft = Draft::open(&target).unwrap();
    let mut file = draft.file("a.txt").unwrap();
    file.write_all(b"half").unwrap();
    let error = draft.seal(seal("s")).unwrap_err();
    assert!(error.to_string().contains("begun and not finished"), "{error}");
    assert_eq!(names(temp.path()), [""; 0]);
}

#[test]
fn what_is_put_aside_is_read_at_any_place_and_leaves_no_file() {
    let temp = tempfile::tempdir().unwrap();
    let draft = Draft::open(&temp.path().join("a")).unwrap();
    let mut spill = draft.spill("rows").unwrap();
    // Short ones, one that is longer than the buffer, and one behind it.
    let records: Vec<Vec<u8>> =
        [3, 0, 1 << 19, 5].iter().enumerate().map(|(n, len)| vec![n as u8; *len]).collect();
    let places: Vec<u64> = records.iter().map(|record| spill.append(record).unwrap()).collect();
    assert_eq!(places, [0, 3, 3, 3 + (1 << 19)]);
    let spill = spill.finish().unwrap();
    assert_eq!(spill.bytes(), 8 + (1 << 19));
    for (record, at) in records.iter().zip(&places).rev() {
        assert_eq!(spill.read(*at, record.len()).unwrap(), *record);
    }
    let error = spill.read(spill.bytes() - 1, 2).unwrap_err().to_string();
    assert!(error.contains("cannot read"), "{error}");
    let sealed = draft.seal(seal("x")).unwrap();
    assert_eq!(names(sealed.dir()), ["manifest.json"]);
    assert_eq!(spill.read(0, 3).unwrap(), [0, 0, 0]);
}

#[test]
fn only_sealed_directories_are_removed() {
    let temp = TempDir::new().unwrap();
    let target = temp.path().join("c/step-1");
    sealed(&target, "abc");
    assert_eq!(children(&temp.path().join("c")).unwrap(), ["step-1"]);
    remove_sealed(&target).unwrap();
    assert_eq!(children(&temp.path().join("c")).unwrap(), [""; 0]);
    fs::create_dir(&target).unwrap();
    assert!(matches!(remove_sealed(&target), Err(StoreError::NotSealed { .. })));
}

#[test]
fn what_a_killed_writer_left_is_swept_unless_somebody_writes() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("c");
    let left = dir.join(".step-1.draft-99");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("x"), b"half").unwrap();
    let writer = Draft::open(&dir.join("step-2")).unwrap();
    sweep_all(&dir).unwrap();
    assert!(!left.exists() && dir.join(".step-2.lock").exists(), "the other writer goes on");
    drop(writer);
    sweep_all(&dir).unwrap();
    assert!(!dir.exists(), "nothing is left in it");
    sweep_all(&dir).unwrap();
}

#[test]
fn a_model_directory_is_known_by_what_it_holds() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path().join("m");
    fs::create_dir(&dir).unwrap();
    assert!(matches!(ModelDir::open(&dir), Err(StoreError::NotModel { .. })));
    fs::write(dir.join("config.json"), b"{}").unwrap();
    fs::write(dir.join("README.md"), b"card").unwrap();
    let before = ModelDir::open(&dir).unwrap();
    assert!(matches!(before.weights(), Err(StoreError::NotModel { .. })));
    let hash = |role| ModelDir::open(&dir).unwrap().input(role).unwrap().sha256;
    let empty = hash("base");
    fs::write(dir.join("README.md"), b"another card").unwrap();
    assert_eq!(hash("base"), empty);
    fs::write(dir.join("model.safetensors"), b"w").unwrap();
    assert_ne!(hash("base"), empty);
    let model = ModelDir::open(&dir).unwrap();
    assert_eq!(model.names(), ["config.json", "model.safetensors"]);
    let of_config = model.input_of("base", &["config.json", "absent.json"]).unwrap();
    assert_eq!(of_config.sha256, empty);
}

/// Weights that are not the model's, as Mistral's `consolidated.safetensors`, are neither read nor hashed.
#[test]
fn of_the_weights_those_count_that_the_model_is_made_of() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path();
    let open = || ModelDir::open(dir).unwrap();
    let put = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    let weights =
        || -> Vec<String> { open().weights().unwrap().into_iter().map(|(name, _)| name).collect() };
    let hash = || open().input("base").unwrap().sha256;
    let refusal = || open().weights().unwrap_err().to_string();
    put("config.json", "{}");
    put("consolidated.safetensors", "a");
    assert_eq!(weights(), ["consolidated.safetensors"], "nothing says otherwise");
    put("model.safetensors", "b");
    assert_eq!(weights(), ["model.safetensors"]);
    assert_eq!(open().names(), ["config.json", "model.safetensors"]);
    let before = hash();
    put("consolidated.safetensors", "c");
    put("adapter_model.safetensors", "d");
    assert_eq!(hash(), before, "what is not read is not hashed");
    put("model-1.safetensors", "e");
    put("model-2.safetensors", "f");
    let index = "model.safetensors.index.json";
    put(
        index,
        r#"{"weight_map": {"x": "model-2.safetensors", "y": "model-1.safetensors", "z": "model-2.safetensors"}}"#,
    );
    assert_eq!(weights(), ["model-1.safetensors", "model-2.safetensors"]);
    let before = hash();
    put("model.safetensors", "g");
    assert_eq!(hash(), before);
    put("model-2.safetensors", "h");
    assert_ne!(hash(), before, "what is read is hashed");
    fs::remove_file(dir.join("model-1.safetensors")).unwrap();
    assert!(refusal().contains("names the file `model-1.safetensors`, which is not there"));
    put(index, "[]");
    assert!(refusal().contains("`model.safetensors.index.json` is no index"), "{}", refusal());
    put(index, r#"{"weight_map": {}}"#);
    assert!(refusal().contains("no weights"), "{}", refusal());
}

#[test]
fn raw_input_is_read_under_a_limit_and_only_from_files() {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("a");
    fs::write(&path, b"abcd").unwrap();
    assert_eq!(input::read(&path, 4).unwrap(), b"abcd");
    assert!(matches!(input::read(&path, 3), Err(StoreError::TooLarge { bytes: 4, max: 3, .. })));
    assert_eq!(input::read(temp.path(), 9).unwrap_err().class(), ErrorClass::Input);
    assert!(matches!(input::read(Path::new("/dev/zero"), 9), Err(StoreError::Io { .. })));
    assert!(matches!(input::open(&temp.path().join("no")), Err(StoreError::NotFound { .. })));
    assert_eq!(input::hash(&path).unwrap(), (sha256(b"abcd"), 4));
}
