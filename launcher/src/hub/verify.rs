//! Checksums of the hub: the name of a blob is the SHA-256 of a large file, and git's SHA-1 of a small
//! one (over `blob LENGTH`, a zero byte, and the contents).

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// Read at once, in bytes.
const PIECE: usize = 1 << 20;

/// Whether a file has the contents that its tag names. A tag of another form says nothing.
pub(super) fn matches(path: &Path, tag: &str) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let mut context = match tag.len() {
        64 => Context::new(&SHA256),
        40 => {
            let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            context.update(format!("blob {}\0", file.metadata()?.len()).as_bytes());
            context
        }
        _ => return Ok(true),
    };
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece)? {
            0 => break,
            read => context.update(&piece[..read]),
        }
    }
    let found: String = context
        .finish()
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(found.eq_ignore_ascii_case(tag))
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn both_kinds_of_tags_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "hello\n").unwrap();
        // What `git hash-object` and `sha256sum` print.
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert!(matches(&path, git).unwrap() && matches(&path, sha).unwrap());
        assert!(matches(&path, "W/abc").unwrap());
        std::fs::write(&path, "hellp\n").unwrap();
        assert!(!matches(&path, git).unwrap() && !matches(&path, sha).unwrap());
    }
}
