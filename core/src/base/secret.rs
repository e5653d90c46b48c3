//! Secrets that are kept outside of URLs, so that neither `ps` nor the history of a shell shows them. A file or an
//! environment variable holds the secret, and the URL of an adapter names the file or the variable.

use std::{fs::File, io::Read};

/// The maximum length of a secret in bytes. A key in PEM format has a few thousand bytes. A much longer text means that
/// the wrong file was named.
const SECRET_BYTES_MAX: u64 = 65_536;

/// Reads a secret from a file, without the newline at its end. An error names the file, but never shows any of its
/// contents.
///
/// ```
/// let error = annals::secret::from_file("/none/password").unwrap_err();
/// assert!(error.starts_with("/none/password: "));
/// ```
pub fn from_file(path: &str) -> Result<String, String> {
    let wrong = |reason: &str| format!("{path}: {reason}");
    let mut text = String::new();
    let file = File::open(path).map_err(|error| wrong(&error.to_string()))?;
    let read = file.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|error| wrong(&error.to_string()))?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(wrong(&format!("a secret has at most {SECRET_BYTES_MAX} bytes")));
    }
    let end = text.strip_suffix('\n').map_or(text.len(), |text| text.strip_suffix('\r').unwrap_or(text).len());
    text.truncate(end);
    if text.is_empty() { Err(wrong("the file is empty; a secret was expected")) } else { Ok(text) }
}

/// Reads a secret from an environment variable. An error names the variable.
pub fn from_env(name: &str) -> Result<String, String> {
    match std::env::var(name) {
        Ok(secret) if !secret.is_empty() => Ok(secret),
        Ok(_) | Err(std::env::VarError::NotPresent) => {
            Err(format!("the environment variable {name} is not set; a secret was expected"))
        }
        Err(std::env::VarError::NotUnicode(_)) => Err(format!("the environment variable {name} is not UTF-8")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn secret_is_read_without_its_newline() {
        let path = std::env::temp_dir().join(format!("annals-secret-{}", std::process::id()));
        let path_text = path.to_str().unwrap();
        for (held, secret) in [("horse\n", "horse"), ("horse\r\n", "horse"), (" a\nb ", " a\nb "), ("x\n\n", "x\n")] {
            std::fs::write(&path, held).unwrap();
            assert_eq!(from_file(path_text).as_deref(), Ok(secret));
        }
        for held in [&b""[..], b"\n", b"\xff", &[b'x'; SECRET_BYTES_MAX as usize + 1]] {
            std::fs::write(&path, held).unwrap();
            let error = from_file(path_text).unwrap_err();
            assert!(error.starts_with(path_text) && !error.contains("xxx"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(from_file(path_text).unwrap_err().contains("No such file"));
        assert!(from_env("ANNALS_NO_SUCH_SECRET").unwrap_err().contains("ANNALS_NO_SUCH_SECRET is not set"));
    }
}
