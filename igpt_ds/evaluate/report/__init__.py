"""Result rows to tables, figures and a page."""
