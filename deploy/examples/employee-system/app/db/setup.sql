-- Roles and the empty database, run once by a superuser against any database of the server:
--
--   psql -X -v ON_ERROR_STOP=1 -d postgres -f setup.sql
--
-- The passwords come from the environment variables MIGRATOR_PASSWORD and APP_PASSWORD, not from -v: what stands in
-- the argument vector can be read by every user of the host. With psql 14 or newer.
--
--   employee_migrator  owns the database and all that is in it; runs migrations, may raise and lower a fence
--   employee_app       what the application logs in as: reads and writes rows, changes no schema
--
-- A fence is   REVOKE CONNECT ON DATABASE employee_system FROM employee_app;   and the end of its sessions. The
-- migrator, being the owner, still connects. GRANT CONNECT lowers it.

-- Passwords must not reach the server's log by way of a logged statement. Superusers may say so.
SET log_statement = 'none';
SET log_min_error_statement = 'panic';
SET log_min_duration_statement = -1;

\getenv migrator_password MIGRATOR_PASSWORD
\getenv app_password APP_PASSWORD
\if :{?migrator_password}
\else
    DO $$ BEGIN RAISE 'MIGRATOR_PASSWORD is not set'; END $$;
\endif
\if :{?app_password}
\else
    DO $$ BEGIN RAISE 'APP_PASSWORD is not set'; END $$;
\endif

CREATE ROLE employee_migrator LOGIN PASSWORD :'migrator_password';
CREATE ROLE employee_app LOGIN PASSWORD :'app_password';

CREATE DATABASE employee_system OWNER employee_migrator TEMPLATE template0 ENCODING 'UTF8';
REVOKE ALL ON DATABASE employee_system FROM PUBLIC;
GRANT CONNECT ON DATABASE employee_system TO employee_app;

\connect employee_system
-- `public` belongs to the database's owner since PostgreSQL 15, and PUBLIC may use but not create in it.
-- What the migrator will create, the application may read and write.
ALTER DEFAULT PRIVILEGES FOR ROLE employee_migrator IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO employee_app;
ALTER DEFAULT PRIVILEGES FOR ROLE employee_migrator IN SCHEMA public
    GRANT USAGE ON SEQUENCES TO employee_app;
