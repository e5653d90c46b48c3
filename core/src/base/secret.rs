//! Secrets that are kept outside of URLs, so that neither `ps` nor the history of a shell shows them. A file or an
//! environment variable holds the secret, and the URL of an adapter names the file or the variable.

use std::{fs::File, io::Read};

/// The maximum length of a secret in bytes. A key in PEM format has a few thousand bytes. A much longer text means that
/// the wrong file was named.
const SECRET_BYTES_MAX: u64 = 65_536;

/// Why a secret could not be read. The error never shows any part of the secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The file cannot be read, or is not UTF-8.
    #[error("{path}: {reason}")]
    File {
        /// The path of the file.
        path: String,
        /// The error message of the operating system.
        reason: String,
    },
    /// The file is too long for a secret.
    #[error("{path}: a secret has at most {SECRET_BYTES_MAX} bytes")]
    TooLong {
        /// The path of the file.
        path: String,
    },
    /// The file is empty.
    #[error("{path}: the file is empty; a secret was expected")]
    Empty {
        /// The path of the file.
        path: String,
    },
    /// The environment variable is missing or empty.
    #[error("the environment variable {name} is not set; a secret was expected")]
    NotSet {
        /// The name of the variable.
        name: String,
    },
    /// The environment variable is not UTF-8.
    #[error("the environment variable {name} is not UTF-8")]
    NotUnicode {
        /// The name of the variable.
        name: String,
    },
}

/// Reads a secret from a file, without the newline at its end. An error names the file, but never shows any of its
/// contents.
///
/// ```
/// let error = annals::secret::from_file("/none/password").unwrap_err();
/// assert!(error.to_string().starts_with("/none/password: "));
/// ```
pub fn from_file(path: &str) -> Result<String, SecretError> {
    let path = path.to_owned();
    let wrong = |error: std::io::Error| SecretError::File { path: path.clone(), reason: error.to_string() };
    let mut text = String::new();
    let file = File::open(&path).map_err(wrong)?;
    file.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text).map_err(wrong)?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(SecretError::TooLong { path });
    }
    let end = text.strip_suffix('\n').map_or(text.len(), |text| text.strip_suffix('\r').unwrap_or(text).len());
    text.truncate(end);
    if text.is_empty() { Err(SecretError::Empty { path }) } else { Ok(text) }
}

/// Reads a secret from an environment variable. An error names the variable.
pub fn from_env(name: &str) -> Result<String, SecretError> {
    let name = name.to_owned();
    match std::env::var(&name) {
        Ok(secret) if !secret.is_empty() => Ok(secret),
        Ok(_) | Err(std::env::VarError::NotPresent) => Err(SecretError::NotSet { name }),
        Err(std::env::VarError::NotUnicode(_)) => Err(SecretError::NotUnicode { name }),
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
            let error = from_file(path_text).unwrap_err().to_string();
            assert!(error.starts_with(path_text) && !error.contains("xxx"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(from_file(path_text).unwrap_err().to_string().contains("No such file"));
        assert!(
            from_env("ANNALS_NO_SUCH_SECRET").unwrap_err().to_string().contains("ANNALS_NO_SUCH_SECRET is not set")
        );
    }
}
