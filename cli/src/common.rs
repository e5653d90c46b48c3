//! The arguments that all commands share.

use clap::Args;

use crate::store::StoreUrl;

/// The store, and the output format.
#[derive(Clone, Debug, Args)]
pub(crate) struct CommonArgs {
    /// The store: `sqlite:PATH` or `postgres://user@host/database`. A password can come from a file or from the
    /// environment: `?password_file=PATH`, `?password_env=VARIABLE`, PGPASSWORD or PGPASSFILE.
    #[arg(long, global = true, value_name = "URL", env = "ANNALS_STORE", hide_env_values = true)]
    pub store: Option<StoreUrl>,
    /// The schema of the store in a PostgreSQL database.
    #[arg(long, global = true, value_name = "NAME", env = "ANNALS_SCHEMA", default_value = "annals")]
    pub schema: String,
    /// Print one JSON value per line.
    #[arg(long, global = true)]
    pub json: bool,
}
