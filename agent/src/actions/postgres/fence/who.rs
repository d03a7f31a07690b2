//! Whom a fence keeps out, and who gets in all the same.

use lockstep_proto::report::Failure;
use tokio_postgres::types::ToSql;

use super::Grant;
use crate::sql::Session;

/// Who may connect to the database `d`, as a condition on the role `r`.
pub(super) const MAY_CONNECT: &str =
    "has_database_privilege(r.oid, d.oid, 'CONNECT') AND r.rolcanlogin";

/// Who may connect even when PUBLIC and the roles in `$1` no longer may.
pub(super) const MAY_CONNECT_STILL: &str = "r.rolcanlogin AND EXISTS (SELECT 1 \
     FROM aclexplode(d.datacl) a JOIN pg_roles g ON g.oid = a.grantee \
     WHERE a.privilege_type = 'CONNECT' \
     AND g.rolname::text <> ALL ($1) AND pg_has_role(r.oid, g.oid, 'USAGE'))";

/// The roles that a condition selects, of those that a fence is to keep out, whether the plan
/// names them or not: all but superusers, the database's owner with its members, and our own.
pub(super) async fn strangers(
    session: &Session,
    condition: &str,
    params: &[&(dyn ToSql + Sync)],
) -> Result<Vec<String>, Failure> {
    let sql = format!(
        "SELECT r.rolname::text FROM pg_roles r, pg_database d \
         WHERE d.datname = current_database() AND NOT r.rolsuper AND r.rolname <> session_user \
         AND NOT pg_has_role(r.oid, d.datdba, 'MEMBER') AND {condition} ORDER BY 1"
    );
    let rows = session.query("asking who gets in", &sql, params).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// A few names for people, and how many more there are.
pub(super) fn few(names: &[String]) -> String {
    match names.split_at_checked(5) {
        Some((shown, more)) if !more.is_empty() => {
            format!("{} and {} more", shown.join(", "), more.len())
        }
        _ => names.join(", "),
    }
}

/// Which of the roles may connect.
pub(super) async fn open_to(session: &Session, roles: &[String]) -> Result<Vec<String>, Failure> {
    let sql = "SELECT rolname::text FROM pg_roles WHERE rolname::text = ANY($1) \
               AND has_database_privilege(oid, current_database(), 'CONNECT') ORDER BY 1";
    let rows = session.query("asking for rights", sql, &[&roles]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The rights to connect that PUBLIC and the roles have.
pub(super) async fn grants(session: &Session, roles: &[String]) -> Result<Vec<Grant>, Failure> {
    let sql = "SELECT r.rolname::text, bool_or(a.is_grantable) FROM pg_database d, \
               aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a \
               LEFT JOIN pg_roles r ON r.oid = a.grantee \
               WHERE d.datname = current_database() AND a.privilege_type = 'CONNECT' \
               AND (a.grantee = 0 OR r.rolname::text = ANY($1)) GROUP BY 1 ORDER BY 1 NULLS FIRST";
    let rows = session.query("asking for rights", sql, &[&roles]).await?;
    Ok(rows
        .iter()
        .map(|row| Grant {
            role: row.get(0),
            grantable: row.get(1),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn very_many_roles_are_counted() {
        let names = |count: usize| (1..=count).map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!(few(&names(5)), "1, 2, 3, 4, 5");
        assert_eq!(few(&names(12)), "1, 2, 3, 4, 5 and 7 more");
    }
}
